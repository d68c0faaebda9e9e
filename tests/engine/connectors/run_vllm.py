"""vLLM with the connector and several ranks, in a process of its own: `python run_vllm.py MODEL PACK STORE RANKS OUT`.

STORE "-": without the connector.
Writes {"texts", "cached"} of a few prompts with fixed token ids.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ALLOW_INSECURE_SERIALIZATION="1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
PROMPTS = [[(7 * n * n + 3 * n + 11 * m) % 250 for n in range(size)] for m, size in enumerate((300, 410))]


def wait_for_coding(worker) -> bool:
    """In every rank."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker.wait(100)


def main(model: str, pack: str, store: str, ranks: int, out: Path) -> None:
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    extra = {"store": store, "min_tokens": 64, "quality": "near-lossless", "draft": "none", "pack": pack}
    transfer = KVTransferConfig(
        kv_connector="ForetoldConnector",
        kv_connector_module_path="engine.connectors.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=extra,
    )
    llm = LLM(
        model,
        enforce_eager=True,
        max_model_len=512,
        dtype="float32",
        tensor_parallel_size=ranks,
        block_size=32,
        disable_log_stats=True,
        kv_transfer_config=None if store == "-" else transfer,
    )
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
    if store != "-":
        assert all(llm.collective_rpc(wait_for_coding))
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    out.write_text(json.dumps({"texts": texts, "cached": [output.num_cached_tokens or 0 for output in outputs]}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), Path(sys.argv[5]))
