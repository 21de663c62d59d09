"""What `make docs` does not know by itself: the constructors of masks, links out of docs/."""

import re

import griffe

OPERANDS = "qkv_jax.ops.operands.Operands"
OPERAND = "qkv_jax.ops.operands.operand"


def on_page_markdown(markdown: str, *, page, **kwargs) -> str:
    """For MkDocs: a link to a file outside docs/ leads nowhere on the site, so its text remains."""
    out_of_docs = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^]\n]+)\]\({re.escape(out_of_docs)}[^)]+\)", r"\1", markdown)


class Constructors(griffe.Extension):
    """For mkdocstrings: the signatures of dataclasses that are not declared by `@dataclass`."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        """Gives `Operands`' subclasses and chex's dataclasses the `__init__` of their fields."""
        modules = [pkg]
        while modules:
            module = modules.pop()
            modules += module.modules.values()
            for cls in module.classes.values():
                if not cls.is_alias and is_dataclass(cls):
                    cls.set_member("__init__", constructor(cls))


def is_dataclass(cls: griffe.Class) -> bool:
    """Whether a class is a dataclass in a way that griffe does not see."""
    by_chex = any(decorator.callable_path == "chex.dataclass" for decorator in cls.decorators)
    return by_chex or any(base.path == OPERANDS for base in cls.mro())


def constructor(cls: griffe.Class) -> griffe.Function:
    """`__init__`, as `dataclasses` writes it."""
    parameters = {"self": griffe.Parameter("self")}
    for owner in reversed([cls, *cls.mro()]):
        for field in owner.attributes.values():
            if field.annotation is not None and "property" not in field.labels:
                parameters[field.name] = griffe.Parameter(
                    field.name,
                    annotation=field.annotation,
                    kind=griffe.ParameterKind.positional_or_keyword,
                    default=default(field.value),
                )
    return griffe.Function("__init__", parameters=griffe.Parameters(*parameters.values()))


def default(value: str | griffe.Expr | None) -> str | griffe.Expr | None:
    """The default of a field that is assigned `value`."""
    if isinstance(value, griffe.ExprCall) and value.canonical_path == OPERAND:
        named = {getattr(x, "name", None): getattr(x, "value", None) for x in value.arguments}
        return named.get("default")
    return value
