"""What holds for the whole project: the direction of imports, what is cheap, what is not named."""

from __future__ import annotations

import importlib.util
import io
import re
import resource
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "openchameleon"
TEXTS = {".py", ".md", ".toml", ".txt", ".sh", ".html", ".json", ".yml", ""}


def _checker():  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("check_imports", ROOT / "tools/check_imports.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imports_go_the_right_way() -> None:
    assert _checker().violations() == []


@pytest.mark.parametrize(
    ("path", "source", "words"),
    [
        ("model/x.py", "def f():\n    import openchameleon.tokenizer.text\n", "model must not"),
        ("inference/x.py", "from openchameleon.vqgan import model\n", "inference must not"),
        ("train/x.py", "from openchameleon.world.scene import Scene\n", "train must not"),
        ("pipeline.py", "from openchameleon import train\n", "pipeline must not"),
        ("vocab.py", "import torch.nn\n", "vocab must not import torch"),
        ("odd/x.py", "import json\n", "no entry"),
    ],
)
def test_the_import_checker_sees_a_wrong_import(
    tmp_path: Path, path: str, source: str, words: str
) -> None:
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source)
    (violation,) = _checker().violations(tmp_path)
    assert words in violation


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from openchameleon.cli.main import main; main(['--help']);"
        " print(sorted({'torch', 'numpy', 'PIL', 'rich'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.endswith("[]\n"), done.stdout
    # Its own CPU time: what is measured is the program, not how busy the machine is.
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1


def test_every_command_explains_itself_without_torch() -> None:
    code = (
        "import sys; from openchameleon.cli.main import COMMANDS, main\n"
        "codes = {main([name, '--help']) for name in COMMANDS}\n"
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("{0} False\n"), done.stdout


def test_importing_the_package_and_documents_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from openchameleon import Document, Text, Image, Message, Conversation, SamplingParams\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_public_name_is_there() -> None:
    import openchameleon

    assert [name for name in openchameleon.__all__ if not hasattr(openchameleon, name)] == []
    assert set(openchameleon.__all__) <= set(dir(openchameleon))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import openchameleon

    with pytest.raises(AttributeError, match="Chamaeleon"):
        _ = openchameleon.Chamaeleon


def test_only_the_world_names_what_the_world_is_made_of() -> None:
    """Everything else must serve any data: no emoji, scenes or cells, no 36 codes a picture."""
    world = {"cli/world.py", "cli/evaluate.py", "cli/demo.py"}
    word = re.compile(r"(?<![-\w])(emoji|scenes?|grid cell|Placed)\b", re.IGNORECASE)
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.split("/")[0] in ("world", "recipes", "evaluation") or name in world:
            continue
        for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
            told = name == "cli/main.py" and token.string.startswith('"the emoji world:')
            if token.type == tokenize.COMMENT or told:  # the list of commands says what `world` is
                continue
            if token.string == "36" or (len(token.string) > 1 and word.search(token.string)):
                found.append(f"{name}:{token.start[0]}: {token.string}")
    assert found == []


def test_no_file_names_a_machine_of_ours() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout")
    pip = [sys.executable, "-m", "pip", "config", "list"]
    settings = subprocess.run(pip, capture_output=True, text=True).stdout
    here = {str(ROOT), *re.findall(r"\w+://[^/\s']*[^\s']*|(?<=')/[^\s']+", settings)}
    places = re.compile("|".join(map(re.escape, sorted(here))))
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in TEXTS and path.is_file() and path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{name}: {m[0]}" for m in places.finditer(text)]
    assert found == []


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pin = re.compile(r"[a-z0-9][a-z0-9._-]*==[0-9][0-9a-z.]*")
    assert [line for line in lines if not pin.fullmatch(line)] == []
    names = [line.split("==")[0] for line in lines]
    assert {"torch", "numpy", "pillow", "pytest"} <= set(names)
    assert names == sorted(names)


def test_no_torchvision_beside_a_torch_that_cannot_load_it() -> None:
    """A stray torchvision of another build makes transformers' Chameleon fail to import."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        pytest.fail(
            f"torchvision is installed but does not fit this torch ({error});"
            " uninstall it: nothing here needs it, and it breaks transformers."
        )


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert len(text) > 10_000


def test_the_tests_that_the_docs_promise_by_exist() -> None:
    docs = [(ROOT / f"docs/{name}.md").read_text() for name in ("reliability", "serving")]
    promised = set(re.findall(r"`(test_\w+)`", "".join(docs)))
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(promised) > 20
    assert promised <= defined, promised - defined
