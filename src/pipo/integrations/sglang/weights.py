"""What a checkpoint must hold: every tensor of its model once, in its shape, and nothing else.

SGLang's own layers take what fits somewhere and leave the rest, so the model as transformers builds it, without memory, says what is to
come.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from pipo.errors import CheckpointError
from pipo.integrations.sglang.families import Weights
from pipo.model.backbone import build_causal_lm
from pipo.model.config import PipoConfig
from pipo.model.files import key_error
from pipo.model.layout import EXPERT, fused_name, is_vision, module_name
from pipo.model.modeling import PipoForCausalLM

Shape = tuple[int, ...]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
STORED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that weights are stored in; others are quantised."""


def expected_shapes(config: PipoConfig) -> dict[str, Shape]:
    """Names and shapes of a checkpoint's tensors, experts of a layer in one."""
    config = deepcopy(config)  # a model marks its config
    with no_init_weights(), torch.device("meta"):
        model = PipoForCausalLM(config, causal_lm=build_causal_lm(config.text_config, None), initialise=False)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class Checklist:
    """Ticks off a checkpoint's tensors as they pass.

    Args:
        expected: as :func:`expected_shapes` gives it. tied: the head is the embedding, and may be stored beside it or not.
        has_vision: tensors of a multimodal base's vision part are left out, else they are unexpected.
    """

    def __init__(self, expected: dict[str, Shape], *, tied: bool, has_vision: bool) -> None:
        self._expected = expected
        self._open = dict(expected)
        self._tied = {HEAD, EMBEDDING} if tied else set()
        self._tied_tensors: list[Tensor] = []
        self._has_vision = has_vision
        self._problems: dict[str, list[str]] = {"unexpected": [], "misshapen": [], "stored_twice": []}

    def check(self, weights: Weights, *, whole: bool) -> Iterator[tuple[str, Tensor]]:
        """The tensors that have a place, under the names of our modules; a tied head is not among them.

        `whole`: nothing may be missing.

        Raises:
            CheckpointError: at the end, naming every tensor that is missing, unexpected, misshapen or stored twice; at once, for one
                whose numbers can't be read.
        """
        for stored, tensor in weights:
            if self._has_vision and is_vision(stored):
                continue
            name = module_name(stored)
            if self._has_place(name, tuple(tensor.shape)):
                if tensor.dtype not in STORED_TYPES:
                    raise CheckpointError(f"{stored} is {tensor.dtype}; quantised weights are not read")
                if name in self._tied:
                    self._compare_tied(tensor)
                if name != HEAD or not self._tied:
                    yield name, tensor
        missing = sorted(set(self._open) - ({HEAD} if self._tied else set())) if whole else []
        if missing or any(self._problems.values()):
            raise key_error("the checkpoint", missing=missing, **self._problems)

    def _has_place(self, name: str, shape: Shape) -> bool:
        if EXPERT.fullmatch(name) and (fused := self._open.pop(fused_name(name), None)):
            self._open |= _one_by_one(fused_name(name), fused)
        wanted = self._open.pop(name, None)
        if wanted == shape:
            return True
        if wanted is not None:
            self._problems["misshapen"].append(f"{name} {shape} should be {wanted}")
        else:
            twice = name in self._expected or name in _pieces(self._expected, name)
            self._problems["stored_twice" if twice else "unexpected"].append(name)
        return False

    def _compare_tied(self, tensor: Tensor) -> None:
        self._tied_tensors.append(tensor)
        if len(self._tied_tensors) == 2:
            if not torch.equal(*self._tied_tensors):
                raise CheckpointError(f"the head is tied to the embedding, but the checkpoint stores another {HEAD}")
            self._tied_tensors.clear()


def _pieces(expected: dict[str, Shape], name: str) -> dict[str, Shape]:
    """All matrices of the experts that a name is of one of."""
    whole = fused_name(name)
    return _one_by_one(whole, expected[whole]) if whole != name and whole in expected else {}


def _one_by_one(name: str, shape: Shape) -> dict[str, Shape]:
    """Names and shapes of the matrices that lie in a tensor of all experts, `[E, out, in]`."""
    experts, kind = name.rsplit(".", 1)
    num_experts, num_out, num_in = shape
    kinds = {"down_proj": num_out} if kind == "down_proj" else {"gate_proj": num_out // 2, "up_proj": num_out // 2}
    return {
        f"{experts}.{index}.{kind}.weight": (rows, num_in)
        for index in range(num_experts)
        for kind, rows in kinds.items()
    }
