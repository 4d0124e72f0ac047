"""The choice between reference and kernel, and the reasons given when there is none."""

import logging
import subprocess
import sys

import pytest
import torch

from longscan.kernels import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("asked", "op", "device", "dtype", "chosen"),
    [
        ("auto", "linear_scan", CPU, torch.float32, "reference"),
        ("auto", "linear_scan", CUDA, torch.bfloat16, "triton"),
        ("auto", "rg_lru", CUDA, torch.float64, "reference"),
        ("auto", "attention", CUDA, torch.bfloat16, "triton"),
        ("auto", "linear_attention", CUDA, torch.bfloat16, "triton"),
        ("auto", "gate_projections", CUDA, torch.bfloat16, "triton"),
        ("auto", "rms_norm", CUDA, torch.bfloat16, "triton"),
        ("auto", "short_conv", CUDA, torch.bfloat16, "triton"),
        ("reference", "rg_lru", CUDA, torch.bfloat16, "reference"),
        ("triton", "rg_lru", CUDA, torch.float16, "triton"),
    ],
)
def test_choice(asked, op, device, dtype, chosen):
    assert dispatch.resolve(asked, op, device, dtype) == chosen


@pytest.mark.parametrize(
    ("op", "device", "dtype", "reason"),
    [
        ("linear_scan", CPU, torch.float32, "the inputs are on cpu; it needs CUDA, or TRITON_INTERPRET=1"),
        ("linear_scan", CUDA, torch.float64, "its kernel has no torch.float64"),
        ("layer_norm", CUDA, torch.float32, "this op has no Triton kernel"),
    ],
)
def test_reasons(op, device, dtype, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"{op}: implementation='triton' cannot run: {reason}"):
        dispatch.resolve("triton", op, device, dtype)


def test_missing_triton_is_a_reason_and_not_a_fallback(monkeypatch):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    for asked in ("auto", "triton"):
        with pytest.raises(ValueError, match="triton is not installed"):
            dispatch.resolve(asked, "rg_lru", CUDA, torch.float32)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="implementation='fast', expected one of auto, reference, triton"):
        dispatch.resolve("fast", "rg_lru", CPU, torch.float32)


def test_each_choice_is_logged_once(caplog):
    dispatch.log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.logger.name):
        for _ in range(3):
            dispatch.resolve("auto", "linear_scan", CPU, torch.float32)
    assert [r.getMessage() for r in caplog.records] == ["linear_scan on cpu in float32: reference (asked: auto)"]


def test_importing_the_ops_imports_no_triton():
    script = "import sys, longscan.kernels; print([m for m in sys.modules if m.split('.')[0] == 'triton'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
