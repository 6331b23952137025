"""Shell: vLLM's CPU build under benchmarks.engine's cases. Runs in .venv-bench, where nothing of this project is.

argv[1] is a JSON object (benchmarks.engine, vllm_results); the last line of the output is RESULT and a JSON object
{case: {tokens, cpu_s, wall_s}}. One thread, in this process. A decode measurement is a run of 1 + steps tokens less a
run of one token, both over cached prompts.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1",
    VLLM_CPU_KVCACHE_SPACE="2",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
)

rng = random.Random(1)


def prompt(num_tokens: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [rng.randrange(1000, 40000) for _ in range(num_tokens)]}


def timed(work: Callable[..., object], *arguments: Any) -> tuple[float, float]:
    """CPU and wall seconds."""
    wall_s, cpu_s = time.perf_counter(), time.thread_time()
    work(*arguments)
    return time.thread_time() - cpu_s, time.perf_counter() - wall_s


def measure(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        enforce_eager=True,
        max_model_len=4096,
        max_num_batched_tokens=2048,
    )

    def generate(prompts: list[dict[str, list[int]]], num_tokens: int) -> None:
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True), use_tqdm=False)

    results: dict[str, dict[str, Any]] = {}
    generate([prompt(64)], 4)
    for num_tokens in settings["prefills"]:
        times = [timed(generate, [prompt(num_tokens)], 1) for _ in range(settings["reps"])]
        results[f"prefill {num_tokens}"] = record(num_tokens, times)
    for batch in settings["batches"]:
        prompts, steps = [prompt(settings["context"]) for _ in range(batch)], settings["steps"]
        generate(prompts, 1)
        times = []
        for _ in range(settings["reps"]):
            first = timed(generate, prompts, 1)
            whole = timed(generate, prompts, 1 + steps)
            times.append((whole[0] - first[0], whole[1] - first[1]))
        results[f"decode b{batch}"] = record(batch * steps, times)
    return results


def record(tokens: int, times: list[tuple[float, float]]) -> dict[str, Any]:
    return {"tokens": tokens, "cpu_s": [cpu_s for cpu_s, _ in times], "wall_s": [wall_s for _, wall_s in times]}


if __name__ == "__main__":
    print("RESULT", json.dumps(measure(json.loads(sys.argv[1]))))
