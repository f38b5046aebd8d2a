"""Runs the cells of a notebook in one namespace, as Jupyter does, without Jupyter."""

import ast
import contextlib
import io
import json


def run(path):
    """Runs a notebook. Returns it with the outputs of this run: what is printed, and the text of each last expression."""
    notebook, names = json.loads(path.read_text(encoding="utf-8")), {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = _outputs("".join(cell["source"]), f"{path.name}, cell {cell['id']}", names)
    return notebook


def texts(notebook):
    """The texts of all outputs, by the id of their cell."""
    return {
        cell["id"]: [
            "".join(output["text"] if "text" in output else output["data"]["text/plain"]) for output in outputs
        ]
        for cell in notebook["cells"]
        if (outputs := cell.get("outputs")) is not None
    }


def write(path, notebook):
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _outputs(source, where, names):
    tree, value, printed = ast.parse(source), None, io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    outputs = []
    if printed.getvalue():
        outputs.append(
            {"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)}
        )
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"})
    return outputs
