"""The C structures and numbers of `abi.h`, field by field; who makes them checks what they hold."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum, IntFlag


class Parts(IntFlag):
    """What of a block to run; PARTIAL, with one half, leaves the residual out."""

    ATTENTION = 1
    MLP = 2
    PARTIAL = 4
    BLOCK = ATTENTION | MLP


class KvType(IntEnum):
    """How keys and values are stored: halves, or bytes with a scale per position and KV head."""

    FP16 = 0
    INT8 = 1


class Activation(IntEnum):
    """What the gate of an MLP goes through; GELU by its tanh form."""

    SILU = 0
    GELU_TANH = 1


NO_ROPE = -1  # `Block.rope` of blocks that do not rotate


class Matrix(Structure):
    """`covey_matrix`."""

    _fields_ = (
        ("type", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("reserved", c_int32),
        ("data", c_void_p),
    )


class Block(Structure):
    """`covey_block`; zeros behind `down` are a block of Llama."""

    _fields_ = (
        ("attn_norm", c_void_p),
        ("ffn_norm", c_void_p),
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("post_attn_norm", "post_ffn_norm", "router")),
        ("experts", POINTER(Matrix)),
        ("window", c_int32),
        ("rope", c_int32),
    )


class Shape(Structure):
    """`covey_shape`."""

    _fields_ = (
        ("hidden_size", c_int32),
        ("n_heads", c_int32),
        ("n_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate_size", c_int32),
        ("rope_dim", c_int32),
        ("rope_interleaved", c_int32),
        ("rms_norm_eps", c_float),
        ("kv_type", c_int32),
        ("attention_scale", c_float),
        ("activation", c_int32),
        ("n_experts", c_int32),
        ("n_experts_used", c_int32),
        ("renormalize_experts", c_int32),
    )


class Rope(Structure):
    """`covey_rope`."""

    _fields_ = (("cosines", c_void_p), ("sines", c_void_p), ("n_positions", c_int64))


class Run(Structure):
    """`covey_run`."""

    _fields_ = (
        ("pages", c_void_p),
        ("n_pages", c_int32),
        ("n_rows", c_int32),
        ("position", c_int64),
    )
