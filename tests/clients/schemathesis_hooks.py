"""Let generated requests reach the model: they name the one that is served, and stay short."""

import schemathesis

MOST_TOKENS, MOST_SAMPLES = 4, 2


@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    if context.operation.path in ("/v1/completions", "/v1/chat/completions"):
        for name, most in (("max_tokens", MOST_TOKENS), ("max_completion_tokens", MOST_TOKENS), ("n", MOST_SAMPLES)):
            value = body.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > most:
                body[name] = most
        body.setdefault("max_tokens", MOST_TOKENS)
    return body


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    return {**path_parameters, "model": "tiny"} if path_parameters and "model" in path_parameters else path_parameters
