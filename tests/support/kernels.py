"""A machine without a C++ compiler."""

from isim.runtime import kernels


def without_compiler(monkeypatch):
    """Let no kernel be had, and `available` ask again."""

    def unavailable(name):
        raise kernels.Unavailable(f"no compiler for {name}")

    monkeypatch.setattr(kernels, "library", unavailable)
    monkeypatch.setattr(kernels, "available", kernels.available.__wrapped__)
