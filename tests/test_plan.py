"""The plan: pure, without a GPU, for GPUs that are not here too."""

import json
import re
from pathlib import Path

import fusedmoe
import numpy as np
import pytest
from fusedmoe import _C
from fusedmoe.models import MODELS, Model
from support import BF16, NumpyBackend, make_layer, run_layer

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "kernels" / "gemm_variants.def"
CHOICES = ROOT / "tests" / "data" / "choices_h200.json"
COLUMNS = (
    "name arch stage act weight scale orient layout rows cols k stages wm wn wk cluster align"
).split()
NUM_SMS = (78, 114, 132)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LARGE_EXPERTS = Model(7168, 2048, 64, 8)
FEW_EXPERTS = Model(6144, 192, 3, 3), Model(512, 3968, 6, 2), Model(3424, 80, 9, 2)
ONE_OF_EXPERTS = Model(5120, 1024, 16, 1), Model(768, 3072, 8, 1)  # Llama 4 Scout tp8, Switch Base
MIB = 1 << 20
LIMIT = 1536 * MIB
DTYPES = {"bf16": "bfloat16", "f16": "float16"}


def variants():
    """The rows of gemm_variants.def as dicts."""
    rows = re.findall(r"^MOE_GEMM_VARIANT\((.*?)\)", TABLE.read_text(), re.M)
    found = []
    for row in rows:
        values = [int(v) if v.strip().isdigit() else v.strip() for v in row.split(",")]
        found.append(dict(zip(COLUMNS, values, strict=True)))
    assert found
    return found


def threads(v):
    """Of a thread block: warps that multiply, and on Hopper those that only copy or write."""
    others = {"sm80": 0, "sm90a": 4, "sm90a_decode": 2, "sm90a_decode_bare": 2}
    others |= dict.fromkeys(
        (
            "sm90a_swap",
            "sm90a_high",
            "sm90a_split",
            "sm90a_plain",
            "sm90a_wide",
            "sm90a_bare",
            "sm90a_joined",
            "sm90a_joined_bare",
        ),
        4,
    )
    return 32 * (v["wm"] * v["wn"] * v["wk"] + others[v["arch"]])


def plan(*args, **kwargs):
    return fusedmoe.plan(*args, **{"num_sms": 132, **kwargs})


def offsets_of(p):
    """(name, offset) of the parts of the workspace, in order."""
    parts = [(k, v) for k, v in p["workspace"].items() if k != "total" and v >= 0]
    return sorted(parts, key=lambda part: part[1])


# -------------------------------------------------------------------------------------------------
# The table of variants
# -------------------------------------------------------------------------------------------------


def test_names_say_what_the_rows_are():
    rows = variants()
    assert len({v["name"] for v in rows}) == len(rows)
    for v in rows:
        any_ = "_any" if v["align"] < 16 else ""
        arch = "" if v["arch"] == "sm80" else f"_{v['arch']}"
        assert v["name"] == f"moe_{v['stage']}_{v['act']}_{v['rows']}x{v['cols']}{any_}{arch}"


def test_info_lists_the_variants():
    assert fusedmoe.info()["kernels"] == [v["name"] for v in variants()]


@pytest.mark.parametrize("v", variants(), ids=lambda v: v["name"])
def test_variant_is_one_that_a_gpu_can_run(v):
    """Whole mma fragments, a ring that fits shared memory, no more than 1024 threads."""
    assert v["stage"] in ("gate_up", "down", "down_add", "experts") and v["act"] in DTYPES
    m, n = ("cols", "rows") if v["orient"] == "swap" else ("rows", "cols")
    assert v[m] % (16 * v["wm"]) == 0 and v[n] % (8 * v["wn"]) == 0
    assert v["k"] % (16 * v["wk"]) == 0
    assert threads(v) <= 1024
    ring = v["stages"] * (v["rows"] + v["cols"]) * v["k"] * 2
    assert ring <= 227 * 1024


def test_gate_up_and_down_have_the_same_heights():
    """One list of tiles serves both stages of a call."""
    for dtype in DTYPES:
        for aligned in (True, False):
            heights = [
                {
                    v["rows"]
                    for v in variants()
                    if v["stage"] == s and v["act"] == dtype and (v["align"] >= 16) == aligned
                }
                for s in ("gate_up", "down")
            ]
            assert heights[0] == heights[1] and heights[0]


def test_tiles_that_add_are_tiles_of_down():
    """The plan takes the row that adds for the tile it has chosen for down."""
    tiles = [
        {(v["act"], v["rows"], v["cols"], v["stages"]) for v in variants() if v["stage"] == stage}
        for stage in ("down", "down_add")
    ]
    assert tiles[1] and tiles[1] < tiles[0]


def test_rows_for_both_stages():
    """Where both stages have a row of sm90a_swap, there is one that does both in one launch, and
    one that does so for plain layers."""
    heights = {
        stage: {
            (v["act"], v["rows"])
            for v in variants()
            if v["stage"] == stage and v["arch"] == "sm90a_swap"
        }
        for stage in ("gate_up", "down", "experts")
    }
    plain = {(v["act"], v["rows"]) for v in variants() if v["arch"] == "sm90a_plain"}
    assert heights["gate_up"] == heights["down"] == heights["experts"] == plain


def chosen(**kwargs):
    """Names of the variants that plans over a wide range of layers choose."""
    names, table = set(), variants()
    for num_sms in NUM_SMS:
        for model in (*MODELS.values(), LARGE_EXPERTS, *FEW_EXPERTS, *ONE_OF_EXPERTS):
            for tokens in TOKENS:
                p = plan(tokens, *model, num_sms=num_sms, **kwargs)
                names |= {table[p[stage]["variant"]]["name"] for stage in ("gate_up", "down")}
    return names


def all_chosen():
    names = set()
    for dtype in ("bfloat16", "float16"):
        for vector_bytes in (16, 2):
            names |= chosen(dtype=dtype, vector_bytes=vector_bytes)
    return names


def portable_chosen(*restriction):
    """The same on a GPU that runs no kernel made for one architecture alone."""
    _C._restrict_plans(*(restriction or (True, 0)))
    try:
        return all_chosen()
    finally:
        _C._restrict_plans(False, 0)


def test_every_variant_is_chosen_somewhere():
    """A row that no layer in use is planned with is dead weight in every wheel."""
    found = all_chosen() | portable_chosen() | portable_chosen(False, 0, True)
    for dtype in ("bfloat16", "float16"):
        found |= chosen(dtype=dtype, deterministic=False)
    # A row for both stages has rows for each alone beside it: test_rows_for_both_stages.
    both = {
        (v["act"], v["rows"]) for v in variants() if v["stage"] == "experts" and v["name"] in found
    }
    alone = {
        v["name"]
        for v in variants()
        if v["arch"] == "sm90a_swap" and v["cols"] == 128 and (v["act"], v["rows"]) in both
    }
    found |= {name.replace("_bare", "") for name in found}
    assert {v["name"] for v in variants()} - found - alone == set()


def test_portable_kernels_alone():
    names = portable_chosen()
    assert not [v["name"] for v in variants() if v["arch"] != "sm80" and v["name"] in names]


def test_plans_of_one_height():
    """What tests/test_variants.py relies on."""
    hopper = {32: "_sm90a_swap", 64: "_sm90a_swap", 96: "_sm90a_swap", 128: "_sm90a", 192: "_sm90a"}
    cases = [(rows, True) for rows in (16, 32, 64, 128)] + [(rows, False) for rows in hopper]
    for rows, portable in cases:
        _C._restrict_plans(portable, rows)
        try:
            p, odd = plan(40, 264, 136, 3, 2), plan(40, 37, 7, 3, 2)
        finally:
            _C._restrict_plans(False, 0)
        assert p["tile_rows"] == rows and odd["tile_rows"] in (16, 64)
        assert not portable or "sm90a" not in p["gate_up"]["name"] + p["down"]["name"]


def test_plans_of_given_rows():
    """What tests/test_variants.py and benchmarks/bench_regret.py rely on."""
    table = variants()
    for up, gate_up in enumerate(table):
        for low, down in enumerate(table):
            if (gate_up["stage"], down["stage"]) != ("gate_up", "down"):
                continue
            _C._fix_plans(up, low)
            try:
                if gate_up["rows"] == down["rows"] and gate_up["act"] == down["act"] == "bf16":
                    arch = gate_up["arch"] + down["arch"]
                    if "decode" not in arch and "bare" not in arch:
                        p = plan(40, 264, 136, 3, 2)
                        assert (p["gate_up"]["variant"], p["down"]["variant"]) == (up, low)
                        continue
                with pytest.raises(NotImplementedError):
                    plan(40, 264, 136, 3, 2)
            finally:
                _C._fix_plans(-1, -1)
    assert plan(40, 264, 136, 3, 2) == plan(40, 264, 136, 3, 2)


def time_of(kernels, us):
    """Of one kernel, or of two. Two that were not timed together: what they cost beside others."""
    if kernels in us or len(kernels) == 1:
        return us.get(kernels)
    up, down = kernels
    pairs = [pair for pair in us if len(pair) == 2]
    others = [
        us[up, d] + us[u, down] - us[u, d] for u, d in pairs if {(up, d), (u, down)} <= us.keys()
    ]
    return min(others, default=None)


def test_choices_against_what_was_measured():
    """200 random layers and the models' 105 points, with all choices timed side by side on an
    H200: the plan's is rarely far from the best."""
    points = json.loads(CHOICES.read_text(encoding="utf-8"))["points"]
    regrets = []
    for *sizes, num_tokens, us in points:
        us = {tuple(names.split(", ")): time for names, time in us.items()}
        p = plan(num_tokens, *sizes)
        names = [p[s]["name"].split("_bf16_")[1] for s in ("gate_up", "down")]
        # as they were timed: plain rows are those with options, joined ones faster than the two
        if "_joined" in names[0]:
            names = [f"{p['tile_rows']}x{p[s]['tile_cols']}_sm90a" for s in ("gate_up", "down")]
        names = [
            re.sub("_(plain|high|wide)$", "_swap", name.replace("_bare", "")) for name in names
        ]
        together = names[0] == names[1] and names[0].endswith("_swap")
        time = time_of(tuple(names[:1] if together else names), us)
        if time is not None:
            regrets.append(time / min(us.values()))
    assert len(regrets) >= 0.9 * len(points)
    assert np.exp(np.log(regrets).mean()) <= 1.03
    assert (np.array(regrets) <= 1.10).mean() >= 0.98


@pytest.mark.parametrize(
    "num_tokens, sizes, options, kernel",
    [
        (128, (2048, 768, 128, 8), {}, "32x128_sm90a_plain"),  # no expert has more than one tile
        (256, (2048, 768, 128, 8), {}, "32x128_sm90a_high"),
        (256, (2048, 768, 128, 8), {"gated": False}, "32x128_sm90a_swap"),
        (512, (2048, 512, 256, 8), {}, "32x128_sm90a_wide"),  # more items than SMs
        (512, (2048, 768, 128, 8), {}, "64x128_sm90a_wide"),
        (512, (4096, 192, 128, 8), {}, "64x128_sm90a_plain"),  # few items
    ],
    ids=str,
)
def test_high_tiles_where_they_would_be_many(num_tokens, sizes, options, kernel):
    p = plan(num_tokens, *sizes, **options)
    assert p["gate_up"]["name"] == p["down"]["name"] == f"moe_experts_bf16_{kernel}"


def test_prefill_runs_on_wgmma():
    """Thousands of rows an expert: the Hopper kernels, one thread block per SM."""
    p = plan(16384, 4096, 1792, 8, 2)
    assert p["gate_up"]["name"].endswith("_sm90a_joined_bare") and p["num_launches"] == 3
    p = plan(512, 4096, 1792, 8, 2)
    assert p["gate_up"]["name"].endswith("sm90a_bare") and p["down"]["name"].endswith("sm90a_bare")


@pytest.mark.parametrize(
    "num_tokens, sizes",
    [(4, (2048, 512, 256, 8)), (8, (4096, 1792, 8, 2)), (64, (4096, 1792, 8, 2))],
    ids=str,
)
def test_wgmma_is_not_chosen_for_a_few_rows_an_expert(num_tokens, sizes):
    """The cost model did, at 4 tokens of qwen35_35b and 8 to 64 of mixtral_tp8, which took 1.08 to
    1.19 times as long as the portable kernels on an H200."""
    p = plan(num_tokens, *sizes)
    assert not p["gate_up"]["name"].endswith("sm90a") and not p["down"]["name"].endswith("sm90a")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("vector_bytes", [16, 2])
@pytest.mark.parametrize("num_sms", NUM_SMS)
def test_chosen_variants_can_do_the_job(dtype, vector_bytes, num_sms):
    table = variants()
    for model in MODELS.values():
        for tokens in TOKENS:
            p = plan(tokens, *model, dtype=dtype, vector_bytes=vector_bytes, num_sms=num_sms)
            assert p["num_sms"] == num_sms
            for stage in ("gate_up", "down"):
                g = p[stage]
                v = table[g["variant"]]
                both = v["stage"] == "experts" and p["gate_up"]["name"] == p["down"]["name"]
                assert (v["stage"] == stage or both) and DTYPES[v["act"]] == dtype
                assert v["align"] <= vector_bytes
                cols = v["cols"]
                if stage == "down" and "_joined" in v["arch"]:  # MOE_JOINED_DOWN_COLS
                    cols = 192 if (v["rows"], v["cols"]) == (192, 192) else 256
                assert (g["tile_rows"], g["tile_cols"]) == (v["rows"], cols)
                assert g["tile_rows"] == p["tile_rows"]
                weight_rows = (
                    2 * model.intermediate_size if stage == "gate_up" else (model.hidden_size)
                )
                assert g["grid_cols"] == -(-weight_rows // cols)
                assert g["threads"] == threads(v)
                assert 0 < g["smem_bytes"] <= 227 * 1024
            slots = p["chunk_tokens"] * model.topk
            # Enough tiles for the worst routing: every expert ends with a tile that is not full.
            full, rest = divmod(slots, p["tile_rows"])
            worst = min(slots, slots // p["tile_rows"] + min(model.num_experts, slots))
            assert p["max_tiles"] >= worst >= full + (rest > 0)


# -------------------------------------------------------------------------------------------------
# Workspace
# -------------------------------------------------------------------------------------------------

PARTS = [
    dict(),
    dict(no_combine="weighted"),
    dict(gated=False),
    dict(routed=True, router_experts=300),
    dict(device="cpu"),
    dict(device="cpu", dtype="float32"),
]


@pytest.mark.parametrize("options", PARTS, ids=lambda o: "-".join(map(str, o.values())) or "plain")
@pytest.mark.parametrize("sizes", [(2048, 768, 128, 8), (511, 129, 3, 2), (1, 1, 1, 1)], ids=str)
def test_workspace_is_monotone_in_num_tokens(options, sizes):
    tokens = [*range(0, 70), *range(70, 5000, 61), 2**14, 2**15, 2**16, 131072, 131073, 2**20]
    got = [fusedmoe.workspace_size(t, *sizes, num_sms=132, **options) for t in tokens]
    assert got == sorted(got)
    assert got[-1] <= LIMIT + 256
    assert all(n % 256 == 0 for n in got)


@pytest.mark.parametrize("options", PARTS, ids=lambda o: "-".join(map(str, o.values())) or "plain")
def test_parts_of_the_workspace_do_not_overlap(options):
    for tokens in (1, 7, 300, 5000, 131072):
        p = plan(tokens, 2880, 720, 128, 4, **options)
        total, parts = p["workspace"]["total"], offsets_of(p)
        assert all(offset % 256 == 0 for _, offset in parts)
        element = 4 if options.get("dtype") == "float32" else 2
        slots = p["chunk_tokens"] * 4
        needs = {
            "expert_offsets": 129 * 4,
            "sorted_token_ids": slots * 4,
            "row_of_slot": slots * 4,
            "topk_ids": slots * 4,
            "topk_weights": slots * 4,
            "tiles": p["max_tiles"] * 16,
            "num_tiles": 12,
            "counts": (p["align_count_blocks"] + p["align_blocks"]) * 128 * 4,
            "intermediate": slots * p["intermediate_stride"] * element,
            "rows": slots * p["rows_stride"] * element,
        }
        assert p["intermediate_stride"] >= 720 and p["rows_stride"] >= 2880
        ends = [offset for _, offset in parts[1:]] + [total]
        for (name, offset), end in zip(parts, ends, strict=True):
            assert offset + needs[name] <= end, f"{name} at {tokens} tokens"
        used = {name for name, _ in parts}
        assert ("topk_ids" in used) == ("topk_weights" in used) == options.get("routed", False)
        assert ("tiles" in used) == (options.get("device") != "cpu")


def test_deepseek_v3_with_131072_tokens():
    sizes = 7168, 2048, 256, 8
    for device in ("cuda", "cpu"):
        p = plan(131072, *sizes, device=device)
        assert p["workspace"]["total"] <= LIMIT
        assert p["num_chunks"] == -(-131072 // p["chunk_tokens"]) > 1
        assert p["workspace"]["total"] >= 0.9 * LIMIT, "the limit is there to be used"


@pytest.mark.parametrize("limit_mib", [16, 64, 512, 1536, 8192])
def test_workspace_limit(limit_mib):
    p = plan(100_000, 2048, 768, 128, 8, workspace_limit=limit_mib * MIB)
    assert p["workspace"]["total"] <= limit_mib * MIB
    assert p["problem"]["workspace_limit"] == limit_mib * MIB
    assert p["num_chunks"] * p["chunk_tokens"] >= 100_000
    assert (p["num_chunks"] - 1) * p["chunk_tokens"] < 100_000


def test_a_limit_below_one_token():
    with pytest.raises(ValueError, match="workspace_limit"):
        plan(4, 2048, 768, 128, 8, workspace_limit=4096)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("limit", [2**50, 2**63 - 1], ids=["2^50", "2^63"])
def test_the_largest_sizes_do_not_overflow(device, limit):
    """The bytes of 2^31 slots of 2^30 columns, twice, passed 2^63 and came out negative: a
    workspace that is too small. hidden_size + intermediate_size passed 2^31."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    options = dict(dtype=dtype, device=device, workspace_limit=limit)
    sizes = 2**30, 2**30, 1
    assert 0 < fusedmoe.workspace_size(1, *sizes, 1, **options) <= limit
    for tokens, topk in ((2**31 - 1, 1), (2**26 - 1, 32)):
        p = plan(tokens, *sizes, topk, **options)
        assert 0 < p["workspace"]["total"] <= limit
        assert p["num_chunks"] == -(-tokens // p["chunk_tokens"])
        assert all(0 <= offset < p["workspace"]["total"] for _, offset in offsets_of(p))
        assert p["gate_up"]["bytes"] > 0 and p["down"]["bytes"] > 0


def test_no_tokens():
    for device in ("cuda", "cpu"):
        p = plan(0, 64, 32, 4, 2, device=device)
        assert p["num_chunks"] == 0 and p["num_launches"] == 0 and p["bytes"] == 0


# -------------------------------------------------------------------------------------------------
# Purity and expectations
# -------------------------------------------------------------------------------------------------


def test_pure():
    args = (300, 2048, 768, 128, 8)
    first = plan(*args)
    plan(1, 64, 64, 4, 2)
    assert plan(*args) == first


def test_a_call_follows_its_plan():
    """What plan says is enough; one byte less is refused (test_errors)."""
    run_layer(NumpyBackend(), make_layer(1, 37, 72, 40, 6, 3, BF16))


@pytest.mark.parametrize("name", MODELS)
def test_expected_work(name):
    """FLOPs exactly; bytes between the touched weights alone and everything that moves."""
    model = MODELS[name]
    for tokens in (1, 64, 4096):
        p = plan(tokens, *model)
        rows = tokens * model.topk
        flops = rows * 6 * model.hidden_size * model.intermediate_size
        assert p["flops"] == pytest.approx(flops, rel=1e-6)
        touched = model.num_experts * (1 - (1 - model.topk / model.num_experts) ** tokens)
        weights = touched * model.expert_elements * 2
        moved = 2 * rows * (3 * model.hidden_size + 3 * model.intermediate_size)
        assert weights <= p["bytes"] * 1.001
        assert p["bytes"] <= weights + moved + 2 * tokens * 2 * model.hidden_size


def test_expected_time_is_above_the_floor_and_finite():
    for name, model in MODELS.items():
        for tokens in TOKENS:
            p = plan(tokens, *model)
            floor = p["flops"] / 0.99e9  # the matrix rate of an H200 in FLOP per microsecond
            assert floor < p["us"] < 1e7, (name, tokens)
            assert np.isfinite(p["us"])


def test_more_tokens_do_not_get_cheaper_by_much():
    """The model may step at a change of variant, but a batch twice as large is no bargain."""
    for model in MODELS.values():
        us = [plan(tokens, *model)["us"] for tokens in TOKENS]
        for a, b in zip(us, us[1:], strict=False):
            assert b > 0.9 * a


def test_launches():
    """One launch a stage; the alignment of many slots takes two. A few tokens: two, without align
    and combine. Kernels that stream the weights under wgmma, and many tiles of prefill: gate_up
    and down in one."""
    for tokens in (1, 32, 256, 2048, 2049):
        p = plan(tokens, 2048, 768, 128, 8)
        align = 2 if p["workspace"]["counts"] >= 0 else 1
        assert align == (1 if tokens * 8 <= 49152 else 2)
        both = p["gate_up"]["name"] == p["down"]["name"]
        assert both == (tokens > 1)
        assert p["num_launches"] == (2 if tokens == 1 else 3 + align - both)
        routed = plan(tokens, 2048, 768, 128, 8, routed=True)
        assert routed["num_launches"] == p["num_launches"] + 1
