"""evalscope's load generator: every request succeeds, and its TTFT and TPOT are there to be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

NUM_REQUESTS, AT_ONCE = 48, 8


def main() -> None:
    """Send the load, read what evalscope wrote about it."""
    prompts, results = Path("prompts.txt"), Path("load")
    prompts.write_text("".join(f"Tell me about number {i} and what comes after it.\n" for i in range(NUM_REQUESTS)))
    options = {
        "--url": os.environ["PIPO_URL"] + "/v1/chat/completions",
        "--api": "openai",
        "--api-key": os.environ["PIPO_KEY"],
        "--model": "tiny",
        "--dataset": "line_by_line",
        "--dataset-path": str(prompts),
        "--tokenizer-path": os.environ["PIPO_CHECKPOINT"],
        "--number": str(NUM_REQUESTS),
        "--parallel": str(AT_ONCE),
        "--min-tokens": "32",
        "--max-tokens": "32",
        "--temperature": "0",
        "--outputs-dir": str(results),
    }
    command = [str(Path(sys.executable).with_name("evalscope")), "perf", "--stream", "--no-timestamp"]
    subprocess.run([*command, *(part for option in options.items() for part in option)], check=True)
    (summary,) = results.rglob("benchmark_summary.json")
    figures = json.loads(summary.read_text())
    print(json.dumps(figures, indent=1))
    assert figures["Success Requests"] == NUM_REQUESTS
    assert figures["Failed Requests"] == 0


if __name__ == "__main__":
    main()
