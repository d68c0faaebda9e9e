"""The compiled functions of a CPU and what they take: int64 (addresses, sizes), but the REAL ones, which are float32."""

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
    "rans_decoded": (
        "states", "words", "word_starts", "sizes", "spans", "lane_tokens", "own", "own_stride", "count", "classes",
        "symbols", "entries", "centres", "gain_symbols", "gain_entries", "q", "gains", "intact",
    ),
    "components": (
        "q", "own", "own_stride", "gains", "steps", "limits", "points", "tokens", "count", "classes", "out", "escapes", "room", "found",
    ),
    "rotated": ("y", "mu", "rest", "rest_stride", "cos", "sin", "rows", "heads", "head_dim", "out", "out_stride"),
    "exponentials": ("x", "vectors"),
    "rounded": ("x", "vectors"),
}  # fmt: skip
"""The functions that can be called, and what they take."""
REAL = ("eps", "scale")
