"""Packages that lesa does without until they are needed: those of its extras, looked for before the work."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple


class Package(NamedTuple):
    """A package by the name that pip knows, the module of it that is used, and the extra of lesa that brings it.

    `ready` names a call of the module that raises where the package cannot work here, e.g. for want of a program.
    """

    name: str
    module: str
    extra: str | None
    ready: str | None = None


NEEDS: dict[str, tuple[Package, ...]] = {
    "comparison": (Package("scikit-image", "skimage.metrics", "bench"),),
    "plots": (Package("matplotlib", "matplotlib.figure", "bench"),),
    "memory": (Package("psutil", "psutil", "bench"),),
    "offload": (Package("accelerate", "accelerate", "bench"),),
    "lora": (Package("peft", "peft", "bench"),),
    "mp4": (
        Package("imageio", "imageio", "video"),
        Package("imageio-ffmpeg", "imageio_ffmpeg", "video", ready="get_ffmpeg_exe"),
    ),
    "sound": (Package("torchsde", "torchsde", "sound"),),
    "LPIPS": (
        Package("torchmetrics", "torchmetrics.image", "scores"),
        Package("torchvision", "torchvision.models", "scores"),
    ),
    "CLIP": (Package("torchmetrics", "torchmetrics.multimodal", "scores"),),
    "ImageReward": (Package("image-reward", "ImageReward", None),),
    "cache-dit": (Package("cache-dit", "cache_dit", "peers"),),
    "hicache-pp": (Package("hicache-pp", "hicache_pp", "peers"),),
}
"""What is asked for, and the packages that it needs beside those that are always there."""


def check(who: str, *asked: str) -> None:
    """Check that all is there that `who` needs for what is asked of it, the names of `NEEDS`.

    Raises: ImportError that names what is not, and how to install it.
    """
    if words := lacking(*asked):
        raise ImportError(f"{who} needs {words}")


def module(name: str, who: str | None = None) -> Any:
    """Return the module of the first package of a name of `NEEDS`, for `who` (that name, if it is not given).

    Raises: ImportError as `check` does.
    """
    check(who or name, name)
    return import_module(NEEDS[name][0].module)


def lacking(*asked: str) -> str:
    """Return in words what is not there of what these names of `NEEDS` need; '' if all is."""
    packages = dict.fromkeys(package for name in asked for package in NEEDS[name])
    reasons = {package: why for package in packages if (why := _why_not(package)) is not None}
    names = [package.name + (f" (it is there, but: {why})" if why else "") for package, why in reasons.items()]
    return f"{' and '.join(dict.fromkeys(names))} ({_install(list(reasons))})" if reasons else ""


def extras() -> dict[str, str]:
    """Return of each extra of lesa what of it is not there, in words; '' if all is."""
    names = sorted({package.extra for some in NEEDS.values() for package in some if package.extra})
    asked = {
        extra: [name for name, some in NEEDS.items() if any(one.extra == extra for one in some)] for extra in names
    }
    return {extra: lacking(*some) for extra, some in asked.items()}


def _install(packages: list[Package]) -> str:
    extras = ",".join(sorted({package.extra for package in packages if package.extra}))
    others = [package.name for package in packages if not package.extra]
    begin = "in a checkout of lesa: " if extras else ""
    return begin + "pip install " + " ".join(([f"'.[{extras}]'"] if extras else []) + others)


def _why_not(package: Package) -> str | None:
    """Return why a package cannot be used: '' if it is not installed, what it says if it fails, None if it can be.

    It is imported: what is installed may still not run, and what is asked for is imported soon anyway.
    """
    try:
        module: Any = import_module(package.module)
        if package.ready:
            getattr(module, package.ready)()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == package.module.split(".")[0]:
            return ""
        return f"{error}"
    except Exception as error:  # whatever a package raises that was built for something else
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
