"""Who may import whom, and who may touch what is private in asyncpg."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import asyncpool_creds

PACKAGE = Path(asyncpool_creds.__file__).parent

# Each may import what stands before it.
CORE = [
    *("_errors", "_tracebacks", "_loopback", "_clock", "_alarm", "_fork", "_threads"),
    *("_expiry", "_credential", "_policy", "_event_log", "_events", "_provider"),
    *("_manager", "_managers", "_keywords"),
    *("_target", "_tls", "_connect_errors", "_connector", "_connect_line"),
    *("_watchdog", "_slots", "_handoff", "_queue", "_fastpath", "_rotation", "_pool"),
]
WITH_ASYNCPG = set(CORE[CORE.index("_keywords") :]) - {"_handoff"}
WITH_ASYNCPG_PRIVATES = {"_watchdog", "_slots", "_fastpath", "_pool"}
FOR_PROVIDERS = {
    *("_credential", "_expiry", "_errors", "_tracebacks", "_loopback"),
    *("_clock", "_events", "_provider", "storage"),
}
# What several sources have in common; each may import what stands before it, and every source all of them.
SHARED_BY_PROVIDERS = [
    *("_arguments", "_retry_after", "_document", "_redaction", "_http"),
    *("_foreign", "_answers"),
    *("_token_endpoint", "_spent", "_exchange"),
    *("_vault_login", "_vault_server"),
    *("_aws_http", "_aws_errors", "_aws_account"),
    "_azure_http",
]
FOR_STORAGE = set(CORE[: CORE.index("_manager")])
ON_TOP = {"testing", "cli", "integrations"}


@dataclass(frozen=True)
class Import:
    """One imported name; `module` is what stands after ``from`` or ``import``."""

    module: str
    name: str | None
    line: int

    @property
    def is_ours(self) -> bool:
        return self.module.partition(".")[0] == "asyncpool_creds"

    @property
    def room(self) -> str | None:
        """The module or folder of ours that this reaches into; None for the package itself."""
        parts = self.module.split(".")
        if len(parts) > 1:
            return parts[1]
        return self.name if self.name is not None and is_room(self.name) else None

    def __str__(self) -> str:
        return f"line {self.line}: {self.module}" + ("" if self.name is None else f".{self.name}")


def is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def files(*rooms: str) -> list[Path]:
    found: list[Path] = []
    for room in rooms:
        path = PACKAGE / room
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return [path for path in found if path.exists()]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[Import]:
    """Yield every import of a file, those for type checkers and inside functions included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            yield from (Import(str(node.module), alias.name, node.lineno) for alias in node.names)


def offences(path: Path, *, allowed: set[str]) -> list[str]:
    return [str(one) for one in imports(path) if one.is_ours and one.room not in allowed]


def ids(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_every_module_has_its_place() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}

    shared = {path.stem for path in (PACKAGE / "providers").glob("_[a-z]*.py")}

    assert modules == set(CORE)
    assert shared == set(SHARED_BY_PROVIDERS)
    assert folders <= {"providers", "storage"} | ON_TOP


@pytest.mark.parametrize("module", CORE)
def test_a_core_module_imports_only_what_stands_before_it(module: str) -> None:
    allowed = set(CORE[: CORE.index(module)])

    assert offences(PACKAGE / f"{module}.py", allowed=allowed) == []


@pytest.mark.parametrize("module", CORE)
def test_a_core_module_needs_asyncpg_and_anyio_at_most(module: str) -> None:
    allowed = {"anyio", "asyncpool_creds"} | ({"asyncpg"} if module in WITH_ASYNCPG else set())

    foreign = [
        str(one)
        for one in imports(PACKAGE / f"{module}.py")
        if (root := one.module.partition(".")[0]) not in sys.stdlib_module_names
        and root not in allowed
        # Type checkers bring their own.
        and root != "typing_extensions"
    ]

    assert foreign == []


@pytest.mark.parametrize("path", files("storage"), ids=ids)
def test_storage_knows_no_manager(path: Path) -> None:
    assert offences(path, allowed=FOR_STORAGE | {"storage"}) == []


@pytest.mark.parametrize("path", files("providers"), ids=ids)
def test_a_provider_knows_neither_manager_nor_pool_nor_another_provider(path: Path) -> None:
    before = SHARED_BY_PROVIDERS
    if path.stem in before:
        before = before[: before.index(path.stem)]
    shared = {f"asyncpool_creds.providers.{name}" for name in before}

    reaches = [
        str(one) for one in imports(path) if one.is_ours and one.room not in FOR_PROVIDERS and one.module not in shared
    ]

    assert reaches == []


@pytest.mark.parametrize("path", files(*ON_TOP, "__main__"), ids=ids)
def test_what_stands_on_top_uses_the_public_package(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    own = "cli" if own == "__main__" else own
    allowed = {own, "providers", "storage"} | ({"testing"} if own == "cli" else set())

    reaches = [str(one) for one in imports(path) if one.is_ours and one.room is not None and one.room not in allowed]
    unlisted = [
        str(one)
        for one in imports(path)
        if one.module == "asyncpool_creds"
        and one.name is not None
        and not is_room(one.name)
        # The lazy __version__ is public without being in __all__.
        and one.name not in {*asyncpool_creds.__all__, "__version__"}
    ]

    assert reaches == []
    assert unlisted == []


def test_the_policy_knows_no_clock_and_no_task() -> None:
    found = {f"{one.module}.{one.name}" if one.name else one.module for one in imports(PACKAGE / "_policy.py")}

    assert found <= {
        "__future__.annotations",
        "dataclasses.dataclass",
        "datetime.timedelta",
        "math",
        "typing.Final",
    }


@pytest.mark.parametrize("module", sorted(set(CORE) - WITH_ASYNCPG_PRIVATES))
def test_only_slots_and_pool_touch_private_parts_of_others(module: str) -> None:
    # A stamp is made, renewed and refused by the manager of its own module; whoever is watched for forks has _forked.
    ours = {"_manager": {"stamp", "self._stamp"}, "_fork": {"owner"}}.get(module, set())

    touched = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree(PACKAGE / f"{module}.py"))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value) not in {"self", "cls", *ours}
    ]

    assert touched == []


@pytest.mark.parametrize("module", sorted(set(CORE) - WITH_ASYNCPG_PRIVATES))
def test_nobody_reaches_for_a_private_name_in_a_string_but_for_what_has_no_other(module: str) -> None:
    # asyncpg's parser of DSNs, and who awaits a future of asyncio's.
    allowed = {"_target": {"_parse_connect_dsn_and_args"}, "_handoff": {"_callbacks"}}.get(module, set())

    reached = {
        argument.value
        for node in ast.walk(tree(PACKAGE / f"{module}.py"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"getattr", "setattr"}
        for argument in node.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("_")
        if not str(argument.value).startswith("__")
    }

    assert reached <= allowed


@pytest.mark.parametrize("path", files("testing", "cli", "integrations", "providers", "storage"), ids=ids)
def test_nobody_outside_the_core_touches_a_private_part_of_asyncpg(path: Path) -> None:
    private = {"_con", "_connect", "_generation", "_holder", "_holders", "_in_use", "_params", "_protocol", "_queue"}

    # What is called through ourselves is our own.
    touched = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr in private and ast.unparse(node.value) not in {"self", "cls"}
    ]

    assert touched == []
