"""The compiled functions of a CPU and what they take: int64 (addresses, sizes), but the REAL ones, which are float32."""

ARGUMENTS = {
    "run_layers": (
        "addresses", "kinds", "norms", "qkv_bias", "o_bias", "qk_norm", "pool", "first", "last",
        "stream", "rows", "width", "cos", "sin", "positions", "places", "requests", "tables", "table_width",
        "heads", "kv_heads", "head_dim", "inner", "page_size",
        "normed", "wide", "wide_width", "attended", "scores", "score_width", "packed", "eps", "scale",
        "part", "parts", "counter",
    ),
    "run_head": ("stream", "rows", "width", "norm", "address", "kind", "outputs", "normed", "packed", "logits", "eps", "part", "parts"),
    "draft": (
        "first", "own", "width", "heads", "kv_heads", "head_dim", "inner", "embeddings", "norm", "address", "kind", "outputs", "token_ids",
        "count", "tokens", "positions", "first_tables", "first_width", "own_tables", "own_width",
        "own_stream", "own_rows", "own_positions", "own_requests", "own_last", "lengths", "longest", "candidates",
        "heights", "slopes", "rates", "row", "passes", "counts", "found", "chances",
        "stream", "index", "row_positions", "before", "cos", "sin", "normed", "wide", "wide_width", "attended", "scores", "score_width", "packed",
        "logits", "eps", "scale",
    ),
    "linear": ("address", "kind", "outputs", "inputs", "x", "rows", "packed", "y"),
    "tiles_coded": ("address", "kind", "outputs", "columns", "tiles"),
    "tiles_unpacked": ("address", "kind", "tiles", "groups", "out"),
    "unpacked": ("address", "kind", "blocks", "out"),
    "rans_decoded": (
        "states", "words", "word_starts", "sizes", "spans", "lane_tokens", "own", "own_stride", "count", "classes",
        "symbols", "entries", "centres", "gain_symbols", "gain_entries", "q", "gains", "intact",
    ),
    "rans_encoded": (
        "q", "own", "own_stride", "gains", "sizes", "spans", "lane_tokens", "count", "classes", "limits", "entries", "centres", "gain_entries",
        "states", "words", "word_starts",
    ),
    "components": (
        "q", "own", "own_stride", "gains", "steps", "limits", "points", "tokens", "count", "classes", "out", "escapes", "room", "found",
    ),
    "gains_chosen": (
        "q", "base", "shifts", "tokens", "count", "classes", "limits", "centres", "excess", "sample", "sampled_zeros", "zeros", "gains",
    ),
    "refined": (
        "x", "q", "base", "shifts", "gains", "tokens", "count", "classes", "limits", "centres", "points", "bits", "bit_price", "out",
    ),
    "rotated": (
        "y", "mu", "rest", "rest_stride", "cos", "sin", "rows", "layers", "heads", "head_dim", "slots", "out",
        "layer_stride", "half_stride", "slot_stride",
    ),
    "scattered": (
        "rows", "row_stride", "tokens", "heads", "head_dim", "pages", "places", "order", "out", "page_stride", "head_stride",
    ),
    "norm_rows": ("x", "residual", "weight", "rows", "width", "eps", "out", "total"),
    "turn_rows": ("x", "row_stride", "rows", "heads", "head_dim", "cos", "sin", "out"),
    "prompt_attention": (
        "q", "q_stride", "k", "k_stride", "v", "v_stride", "tokens", "keys", "heads", "kv_heads", "head_dim", "laid_out", "sums", "out", "scale",
    ),
    "exponentials": ("x", "vectors"),
    "rounded": ("x", "vectors"),
}  # fmt: skip
"""The functions that can be called, and what they take."""
MODEL = ("addresses", "kinds", "norms", "qkv_bias", "o_bias", "qk_norm", "pool", "layers", "page_size", "cos", "sin")
"""What `draft` is told of its first layers, and of its own: int64, addresses but for the number of layers and the page size."""
REAL = ("eps", "scale", "row", "bit_price")
