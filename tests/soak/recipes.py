"""Recipes at random: `python -m tests.soak.recipes --examples 100000 --seed 0`.

Each is a shipped recipe, or a tiny one on data that is there, with some of its values, keys or characters changed, or
some `--set`. Each is right where it is read and checked, or refused with an error that says why, within two seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfcompress.recipe import loader
from hfcompress.recipe.yaml_text import dump_yaml

SECONDS = 2.0
"""What reading and checking one recipe may take."""
HANGS = 120
"""Seconds after which a recipe is taken to hang: the program ends with a traceback of where it was."""
ADDRESSES = 16 << 30
"""Bytes of address space; torch alone takes a third of them."""
SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 10**12, 2**63, -(2**63) - 1, 10**40, 0.0, 0.5, -0.5, 1e-9, 1e300, 1e-320,
    float("inf"), float("nan"), "", " ", "a", "x" * 300, "é" * 130, "../..", "./gone", "/", "/dev/null", "~",
    "~nobody/x", "user/name", "user/name@main", "a/b/c", "@", "a@", "builtin:quickstart", "builtin:", "source",
    "parent", "model", "01-distill", "99-prune", "\x1b[2J", "a\nb", "\u202e", "💥", "no", "null", "1", "1e5",
    "2024-01-01", "en", "other",
    "https://x/y", "[", "{", "${x}", "%s", "{0}", "\\", "'", '"', "`", "<b>", "|", "mit", "cpu", "float16", "onnx_int8",
    "soft_labels", "taylor", "accuracy", "f1", "train", "dev", "test", "sentence", "label",
]  # fmt: skip
CHARACTERS = "\t\n :-{}[],&*#?|>!%@`'\"\\~=.0_/aéñ\x00\x1b\x85\u2028\ufeff\ud83d💥"
TEXTS = [
    "!!timestamp x", "!!int x", "!!int ''", "!!float x", "!!bool x", "!!null x", "!!binary x", "!!binary '*'",
    "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!map x", "!!seq x", "!!str [a]", "!!python/name:os.system ''",
    "!x y", "!<tag:yaml.org,2002:int> 1", "{<<: x}", "{<<: [a]}", "{<<: {a: 1}}", "*x", "&x [*x]", "&x 1", "'", '"\\0"',
    '"\\ud800"', '"\\u202e"', '"\\e[2J"', "2024-13-45", "12:30:45", "0o17", "0x_", "1__0", "=", "<<", "- 1", "? x",
    "[" * 200, "[" * 3000, "{a: " * 300, "9" * 5000, "9" * 400, "1e400", ".inf", "-.inf", ".nan", "|\n  x", ">-\n  y",
    "%YAML 9.9", "---", "...", "\t", "a: b: c", "[a, b", "{a: b", "{null: 1}", "{true: 1}", "{1.5: 1}", "{[a]: 1}",
    "{a: 1, a: 2}", "x" * 5000,
]  # fmt: skip
KEYS = [
    "", "x", "use", "kind", "from", "train", "null", "no", "1", "1.5", "<<", "stages", "\x1b", "é", "__class__",
    "model_config", "weight", "epochs", "max_steps", "heads", "layers", "hidden", "task", "teacher", "student",
    "backend", "budget", "schedule", "criterion", "losses", "recover", "weights", "vocabulary", "tune",
    "multiple_of", "block", "n_of_m", "share", "augment", "lora", "positions", "layer_map", "temperature", "splits",
    "type", "text", "label", "metric", "config", "dataset",
]  # fmt: skip
BIG = [[], {}, [[]], [{}], {"x": {}}, ["a"] * 50, list(range(50)), {str(n): n for n in range(50)}, [None], [1, "a"]]


class Fuzzer:
    """Makes recipes from seeds.

    Args:
        starts: Recipes to change.
    """

    def __init__(self, starts: list[str]) -> None:
        self.texts = starts
        self.trees = [loader.parse(text, Path("recipe.yaml")).data for text in starts]
        self.parts = [part for tree in self.trees for part in _parts(tree)]

    def make(self, seed: int) -> tuple[Any, list[str]]:
        """A recipe, as its text or as what it says, and its `--set` assignments."""
        draw = random.Random(seed)
        how = draw.random()
        if how < 0.15:
            return self._garbled(draw), []
        if how < 0.25:
            return draw.choice(self.texts), [self._assignment(draw) for _ in range(draw.randint(1, 3))]
        tree = _copy(draw.choice(self.trees))
        for _ in range(draw.choice([1, 1, 1, 2, 3, 6])):
            tree = self._changed(draw, tree)
        overrides = [self._assignment(draw)] if draw.random() < 0.05 else []
        if draw.random() < 0.8 and isinstance(tree, dict):
            return tree, overrides
        text = dump_yaml(tree)
        return self._with_text(draw, text) if draw.random() < 0.5 else text, overrides

    def _garbled(self, draw: random.Random) -> str:
        text = draw.choice(self.texts)
        for _ in range(draw.choice([1, 1, 2, 5])):
            at = draw.randrange(len(text))
            end = at + draw.choice([0, 0, 1, 3, 40])
            text = text[:at] + "".join(draw.choices(CHARACTERS, k=draw.choice([0, 1, 1, 2]))) + text[end:]
        return text if draw.random() < 0.7 else self._with_text(draw, text)

    def _with_text(self, draw: random.Random, text: str) -> str:
        """A line's value, or all of what follows, is something that only YAML can say."""
        lines = text.splitlines()
        at = draw.randrange(len(lines)) if lines else 0
        if not lines:
            return draw.choice(TEXTS)
        head, colon, _ = lines[at].partition(":")
        lines[at] = f"{head}{colon} {draw.choice(TEXTS)}" if colon else draw.choice(TEXTS)
        return "\n".join(lines)

    def _assignment(self, draw: random.Random) -> str:
        path, _ = draw.choice(self.parts)
        parts = [str(part) for part in path] or ["name"]
        for _ in range(draw.choice([0, 0, 1, 2])):
            parts.insert(
                draw.randrange(len(parts) + 1), draw.choice([*KEYS, "0", "-1", "99999999999", "9" * 5000, "²"])
            )
        value = draw.choice([lambda: draw.choice(TEXTS), lambda: json.dumps(self._value(draw))])()
        return ".".join(parts) + draw.choice(["=", "=", "=", "=", "", "=="]) + value

    def _value(self, draw: random.Random) -> Any:
        how = draw.random()
        if how < 0.65:
            return draw.choice(SCALARS)
        return _copy(draw.choice(BIG)) if how < 0.75 else _copy(draw.choice(self.parts)[1])

    def _changed(self, draw: random.Random, tree: Any) -> Any:
        path, value = draw.choice(list(_parts(tree)))
        if not path:
            return self._value(draw) if draw.random() < 0.05 else tree
        holder = tree
        for part in path[:-1]:
            holder = holder[part]
        last, how = path[-1], draw.random()
        if how < 0.7:
            holder[last] = self._number(draw, value)
        elif how < 0.76:
            del holder[last]
        elif isinstance(holder, list):
            holder.insert(draw.randrange(len(holder) + 1), self._value(draw))
        elif how < 0.8:
            holder[draw.choice(KEYS)] = holder.pop(last)
        else:
            holder[draw.choice(KEYS)] = self._value(draw)
        return tree

    def _number(self, draw: random.Random, value: Any) -> Any:
        """A value near the one that is there, or any other."""
        if isinstance(value, (int, float)) and not isinstance(value, bool) and draw.random() < 0.5:
            near = [value + 1, value - 1, value * 2, value * 3, value * 1000, -value]
            return draw.choice(near if isinstance(value, int) else [*near, value / 2, value / 1e9])
        if isinstance(value, bool) and draw.random() < 0.5:
            return not value
        if isinstance(value, str) and draw.random() < 0.5:
            return draw.choice([entry for entry in SCALARS if isinstance(entry, str)])
        return self._value(draw)


def _parts(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    found = [(path, tree)]
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        found += _parts(value, (*path, key))
    return found


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def starts(folder: Path) -> list[str]:
    """The shipped recipes, each on a model and data that are there, so that a check goes to its end."""
    from hfcompress.recipe.loader import find_shipped
    from tests import factories

    data = factories.write_data(folder / "data")
    model = folder / "model"
    model.mkdir()
    width = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 12}
    config = factories.model().config.to_dict() | width | {"max_position_embeddings": 512, "vocab_size": 30522}
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes(b"")
    texts = []
    for path in find_shipped().values():
        tree = loader.read(path).data
        texts.append(path.read_text(encoding="utf-8"))
        if tree["task"]["type"] == "text-classification":
            tree["model"], tree["task"]["dataset"], tree["task"]["text"] = str(model), str(data), ["sentence"]
            texts += 4 * [dump_yaml(tree)]
    texts.append(factories.recipe(folder / "tiny.yaml", model, data).read_text())
    return texts


def check(folder: Path, content: Any, overrides: list[str]) -> None:
    """Reads and checks a recipe, and prints what `check` would of an error.

    Raises:
        HfcompressError: where it is refused.
    """
    from hfcompress.recipe.plan import plan
    from hfcompress.recipe.schema import spell_out
    from hfcompress.recipe.validate import check as check_recipe
    from hfcompress.report.doctor import list_warnings
    from hfcompress.utils.errors import HfcompressError

    path = folder / "recipe.yaml"
    try:
        if isinstance(content, str):
            path.write_bytes(content.encode("utf-8", errors="surrogatepass"))
            loaded = loader.load(path, overrides)
        else:  # most of the time would go into YAML
            read = loader.Document(path, "", content)
            for assignment in overrides:
                read = loader.override(read, assignment)
            loaded = loader.validate(read)
        dump_yaml(spell_out(loaded.recipe))
        check_recipe(loaded)
        plan(loaded)
        list(list_warnings(loaded.recipe))
    except HfcompressError as error:
        str(error).encode()
        raise


def wrong(folder: Path, content: Any, overrides: list[str]) -> str:
    """What is not as it should be with a recipe; empty where all is."""
    from hfcompress.utils.errors import HfcompressError

    start = time.process_time()
    try:
        check(folder, content, overrides)
    except HfcompressError:
        pass
    except BaseException:
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):
            raise
        return traceback.format_exc(limit=-4)
    seconds = time.process_time() - start
    return f"took {seconds:.1f} s" if seconds > SECONDS else ""


def run(seeds: range, report: Callable[[int, str], None]) -> int:
    """Tries one recipe a seed, in a folder of its own; the number of those that did not end as they should."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder, before = Path(name), Path.cwd()
        fuzzer = Fuzzer(starts(folder))
        os.chdir(folder)
        wrong(folder, fuzzer.texts[-1], [])  # imports take their time, once
        try:
            for seed in seeds:
                faulthandler.dump_traceback_later(HANGS, exit=True)
                if found := wrong(folder, *fuzzer.make(seed)):
                    failed += 1
                    report(seed, found)
        finally:
            faulthandler.cancel_dump_traceback_later()
            os.chdir(before)
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Tries recipes and prints how many ended as they should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="the first seed; each example has the next one")
    options = parser.parse_args(arguments)
    # One recipe must not take the machine with it: too much memory is an error, and a hang ends with its traceback.
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    seeds = range(options.seed, options.seed + options.examples)
    failed = run(seeds, lambda seed, found: print(f"seed {seed}: {found}", file=sys.stderr, flush=True))
    print(f"recipes: tried {len(seeds)}, as it should {len(seeds) - failed}, not {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
