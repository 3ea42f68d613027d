"""A row that tests change where they need to."""

from __future__ import annotations

from kdq.records.rows import Row

ROW = Row(
    data="digits",
    method="vkd",
    arch="resnet20",
    role="student",
    seed=0,
    quantizer="gpfq",
    alphabet="uniform",
    bits=4,
    avg_bits=4.0,
    search="",
    top1_float=98.0,
    top1=97.0,
    top5=100.0,
    drop=1.0,
    nll=0.1,
    ece=1.0,
    val_top1=99.0,
    params=1000,
    weight_bits_total=4000,
    size_bytes=600,
    float_bytes=4100,
    macs=10_000,
    calibration_images=64,
    latency_ms_torch=0.5,
    train_seconds=1.0,
    quantize_seconds=0.1,
    device="cpu x2",
    kdq_version="0",
    git_sha="",
    config_hash="aa",
    wandb_run="",
    artifact="",
)
