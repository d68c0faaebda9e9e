"""The compiled functions of the CPU's decode step and what they take: int64 (addresses, sizes), but the REAL ones, which are float32."""

ARGUMENTS = {
    "run_layers": (
        "addresses", "kinds", "norms", "qkv_bias", "o_bias", "qk_norm", "pool", "first", "last",
        "stream", "rows", "width", "cos", "sin", "positions", "places", "requests", "tables", "table_width",
        "heads", "kv_heads", "head_dim", "inner", "page_size",
        "normed", "wide", "wide_width", "attended", "scores", "score_width", "packed", "eps", "scale",
    ),
    "run_head": ("stream", "rows", "width", "norm", "address", "kind", "outputs", "normed", "packed", "logits", "eps"),
    "linear": ("address", "kind", "outputs", "inputs", "x", "rows", "packed", "y"),
    "unpacked": ("address", "kind", "blocks", "out"),
    "exponentials": ("x", "vectors"),
    "rounded": ("x", "vectors"),
}  # fmt: skip
"""The functions that can be called, and what they take."""
REAL = ("eps", "scale")
