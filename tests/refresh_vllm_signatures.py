"""Writes tests/data/vllm_signatures.json, what the vLLM door relies on, from vLLM's own source:

    pip download --no-deps vllm==0.33.0 && unzip -q vllm-*.whl 'vllm/*' '*.dist-info/METADATA'
    python tests/refresh_vllm_signatures.py FOLDER

FOLDER has vllm/ in it. Nothing of vLLM is imported: the source is parsed. The record holds names,
arguments and defaults, no code.
"""

import ast
import json
import re
import sys
from pathlib import Path

RECORD = Path(__file__).parent / "data" / "vllm_signatures.json"
MOE = "vllm/model_executor/layers/fused_moe"
# Classes of which every method, field or value is recorded; functions; names that must exist.
CLASSES = {
    f"{MOE}/modular_kernel.py": [
        "FusedMoEExperts",
        "FusedMoEExpertsModular",
        "FusedMoEActivationFormat",
    ],
    f"{MOE}/activation.py": ["MoEActivation", "ApplyMoEActivationConfig"],
    f"{MOE}/config.py": ["FusedMoEConfig", "FusedMoEParallelConfig"],
    f"{MOE}/unquantized_fused_moe_method.py": ["UnquantizedFusedMoEMethod"],
    f"{MOE}/topk_weight_and_reduce.py": ["TopKWeightAndReduceNoOP"],
    f"{MOE}/experts/triton_moe.py": ["TritonExperts"],
    "vllm/model_executor/custom_op.py": ["CustomOp"],
}
FUNCTIONS = {
    f"{MOE}/moe_output.py": ["route_major_moe_output"],
    f"{MOE}/activation.py": ["apply_moe_activation_supported"],
    f"{MOE}/oracle/unquantized.py": ["select_unquantized_moe_backend"],
}


def arguments(function):
    """[[name, default or None], ...] as written, self left out."""
    a = function.args
    names = [arg.arg for arg in a.posonlyargs + a.args]
    defaults = [None] * (len(names) - len(a.defaults)) + [ast.unparse(d) for d in a.defaults]
    pairs = list(zip(names, defaults, strict=True))
    pairs += [
        (arg.arg, default and ast.unparse(default))
        for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    return [list(pair) for pair in pairs if pair[0] != "self"]


def describe(node):
    """Methods, annotated fields and constants of a class."""
    methods, fields, values = {}, [], {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            decorators = {ast.unparse(d) for d in item.decorator_list}
            methods[item.name] = {
                "arguments": arguments(item),
                "abstract": "abstractmethod" in decorators,
                "static": "staticmethod" in decorators,
                "property": "property" in decorators,
            }
        elif isinstance(item, ast.AnnAssign):
            fields.append(item.target.id)
        elif isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant):
            values[item.targets[0].id] = item.value.value
    return {
        "bases": [ast.unparse(base) for base in node.bases],
        "methods": methods,
        "fields": fields,
        "values": values,
    }


def record(folder):
    folder = Path(folder)
    (metadata,) = folder.glob("vllm-*.dist-info/METADATA")
    version = re.search(r"^Version: (\S+)", metadata.read_text(encoding="utf-8"), re.MULTILINE)
    result = {"version": version.group(1), "classes": {}, "functions": {}, "activations": []}
    for file in sorted({*CLASSES, *FUNCTIONS}):
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        module = file.removesuffix(".py").replace("/", ".")
        named = {n.name: n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
        for name in CLASSES.get(file, ()):
            result["classes"][name] = {"module": module, **describe(named[name])}
        for name in FUNCTIONS.get(file, ()):
            result["functions"][name] = {"module": module, "arguments": arguments(named[name])}
        if file.endswith("activation.py"):
            result["activations"] = triton_activations(tree)
    return result


def triton_activations(tree):
    """The members of MoEActivation that vLLM's own Triton experts take."""
    for node in tree.body:
        target = getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id == "_APPLY_MOE_ACTIVATIONS":
            return [ast.unparse(item).partition(".")[2] for item in node.value.args[0].elts]
    raise SystemExit("activation.py has no _APPLY_MOE_ACTIVATIONS")


def lines(value, depth):
    """JSON with a line for each entry down to `depth`."""
    if depth == 0 or not isinstance(value, dict) or not value:
        return json.dumps(value)
    entries = [f"{json.dumps(key)}: {lines(item, depth - 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(entries) + "\n}"


if __name__ == "__main__":
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(lines(record(*sys.argv[1:]), 4) + "\n", encoding="utf-8")
    print(f"wrote {RECORD}")
