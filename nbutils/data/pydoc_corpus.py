"""`pydoc`, the embedded corpus: documentation that is already on the machine.

It is the docstrings of the Python standard library and of five pinned packages, one module a document; in task qa,
questions about what the modules define and the first sentences of the docstrings that answer them. The modules are
parsed, never imported.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from nbutils.data.question_corpus import pair_document
from nbutils.data.sources import CorpusRequest, Document, Located, Source
from nbutils.foundation import CorpusError

WORDS, CHARACTERS = range(4, 41), range(20, 241)  # of a sensible answer
ROLE = re.compile(r":[\w:+-]+:`~?(?:[^`<]*<)?~?!?([^`<>]+)>?`")  # :func:`median`, :class:`~torch.Tensor`
QUOTED = re.compile(r"``([^`]+)``|`([^`<]+)(?:<[^`]+>)?`_{0,2}")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\betc\.)(?<!\bvs\.)(?<!\bcf\.)\s+(?=[A-Z`\"'(*])")
MARKUP = re.compile(r"\.\. |::|>>>|\|\w+\||[{}\\`<>*_=]{2,}|\\\w|:\w+:|\S\.\.\.|->|https?:|[`\\$%]")
DEPRECATED = re.compile(r"deprecat|do not use|internal|todo|not implemented", re.IGNORECASE)

# This list and no other: a new requirement of the project must not change the embedded data.
PYDOC_PACKAGES = ("torch", "numpy", "pandas", "matplotlib", "nltk")
# Some systems ship Python without its tests, so they cannot be part of a corpus that is the same everywhere.
PYDOC_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}


def pydoc_versions() -> dict[str, str]:
    """Versions of what the embedded corpus is made of; builds (`+cpu`) left out."""
    packages = {package: importlib.metadata.version(package).split("+")[0] for package in PYDOC_PACKAGES}
    return {"python": platform.python_version(), **packages}


def _find_pydoc(request: CorpusRequest) -> Located:
    """The standard library's folder, then that of each package: found without importing any of them."""
    if request.data_files:
        raise CorpusError(
            f"dataset_name 'pydoc' is embedded and reads no files, but data_files is {request.data_files!r}. "
            "Leave data_files empty, or set dataset_name to text, jsonl, csv or parquet."
        )
    folders = [Path(sysconfig.get_path("stdlib"))]
    for package in PYDOC_PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise CorpusError(
                f"The embedded corpus needs the package {package!r}, which is not installed. Run `make`, or: "
                "python -m pip install -r requirements.txt"
            )
        folders.append(Path(found.submodule_search_locations[0]))
    return Located(tuple(folders))


def _read_pydoc(request: CorpusRequest, located: Located) -> list[Iterator[Document]]:
    return [_questions(located.files) if request.task == "qa" else _modules(located.files)]


def _modules(folders: tuple[Path, ...]) -> Iterator[Document]:
    for name, file in _shuffled(folders):
        if text := "\n\n".join(_docstrings(file)):
            yield Document(name, text)


def _questions(folders: tuple[Path, ...]) -> Iterator[Document]:
    """Questions about the modules. Each answer stands once: a method that many classes share tells little twice."""
    asked: set[str] = set()
    for name, file in _shuffled(folders):
        if tree := _parse(file):
            for question, answer in module_questions(name, tree):
                if not asked & {question.lower(), answer.lower()}:
                    asked |= {question.lower(), answer.lower()}
                    yield pair_document(question.split()[2].rstrip("?"), question, answer)


def _shuffled(folders: tuple[Path, ...]) -> list[tuple[str, Path]]:
    """Modules in the order of a hash of their names: the first hundred are a fair sample of the whole."""
    modules = _module_files(*folders)
    return sorted(modules.items(), key=lambda module: blake2b(module[0].encode(), digest_size=8).digest())


def _module_files(standard_library: Path, *packages: Path) -> dict[str, Path]:
    """Dotted module name -> source file, tests left out."""
    modules: dict[str, Path] = {}
    folders = [standard_library / name for name in sys.stdlib_module_names]
    for folder in [*folders, *packages]:
        for file in [folder.with_suffix(".py"), *folder.rglob("*.py")]:
            parts = file.relative_to(folder.parent).with_suffix("").parts
            if file.is_file() and not PYDOC_SKIPPED_FOLDERS.intersection(parts):
                modules[".".join(parts).removesuffix(".__init__")] = file
    return modules


def _parse(file: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's source are not our user's business
        try:
            return ast.parse(file.read_bytes())
        except SyntaxError:  # source for another Python version, as torch ships some
            return None


def _docstrings(file: Path) -> list[str]:
    """The docstrings of a module, its classes and functions, in the order of the source."""
    tree = _parse(file)
    pending: list[ast.AST] = [tree] if tree else []
    found = []
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node) or "")
        children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        pending.extend(reversed(children))
    # Tokenizers refuse lone surrogates, which a docstring may hold as an escape.
    return [docstring.encode("utf-8", "replace").decode() for docstring in found if docstring]


PYDOC = Source(
    _find_pydoc,
    _read_pydoc,
    "Almost certainly seen by any pretrained model: the documentation of widely used packages is in web and code "
    "corpora many times over. Judge pretrained models on it by differences between arms only.",
    has_questions=True,
)


def module_questions(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(question, answer) for each public function, class and method of a public module, in the order of the source."""
    if any(part.startswith("_") for part in module.split(".")):
        return
    for name, node in _definitions(module, tree):
        answer = first_sentence(ast.get_docstring(node) or "")
        if answer:
            described = isinstance(node, ast.ClassDef) or any(_is_property(each) for each in node.decorator_list)
            yield f"What is {name}?" if described else f"What does {name} do?", answer


def first_sentence(docstring: str) -> str:
    """The first sentence on one line and without markup, "" where there is none that reads as an answer."""
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    plain = QUOTED.sub(lambda match: match[1] or match[2], ROLE.sub(r"\1", paragraph)).strip()
    sentence = SENTENCE_END.split(plain, maxsplit=1)[0]
    sound = sentence.endswith(".") and not sentence.endswith("..") and sentence[:1].isupper() and sentence.isascii()
    sized = len(sentence.split()) in WORDS and len(sentence) in CHARACTERS
    return sentence if sound and sized and not MARKUP.search(sentence) and not DEPRECATED.search(sentence) else ""


def _definitions(
    prefix: str, parent: ast.Module | ast.ClassDef
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Public functions and classes with their dotted names; what stands inside a function is nobody's to call."""
    for node in parent.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield f"{prefix}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(f"{prefix}.{node.name}", node)


def _is_property(decorator: ast.expr) -> bool:
    return "property" in ast.unparse(decorator)
