"""The jobs of benchmarks/rollout.py through vLLM on a CPU, in an environment of its own: see README.md beside this."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by itself it leaves a core to others, one of two here
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))  # as ours


def main() -> None:
    from vllm import LLM, SamplingParams

    model, dtype, source, answers = sys.argv[1:]

    def answer(value: object) -> None:
        os.write(int(answers), f"{json.dumps(value)}\n".encode())

    engine = LLM(model=model, dtype=dtype, max_model_len=1024, max_num_seqs=64)
    answer("ready")
    calls = [(job, prompts) for job in json.loads(Path(source).read_text()) for prompts in job["prompts"]]
    for (job, prompts), _ in zip(calls, sys.stdin, strict=False):
        tokens = job["tokens"]
        params = SamplingParams(
            n=job["group_size"], temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        started = time.perf_counter()
        outputs = engine.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        lengths = {len(completion.token_ids) for output in outputs for completion in output.outputs}
        assert lengths == {tokens}, lengths
        answer(seconds)
    answer({"peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})


if __name__ == "__main__":
    main()
