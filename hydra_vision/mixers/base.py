"""What the mixers share: their contract, and the wrapper around the matrices of the family.

    z | v, extras = in_proj(u)
    v, extras = conv1d(v, extras), depthwise; SiLU(v), for some classes SiLU(extras)
    y = M v + v                                   (the (semi)separable classes with a free diagonal: y = M v)
    out_proj(RMSNorm(y) * weight * SiLU(z))

M is (L, L), one per head (and image, where it depends on the data). Source: the matrix mixer framework of Hwang,
Lahoti, Dao, Gu, "Hydra", NeurIPS 2024, section 2, and goombalab/hydra, ``hydra/modules/matrix_mixer.py``.
"""

import inspect
from typing import Any, ClassVar, Dict, Iterable, Mapping, Optional, Set, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

from ..errors import nearest
from ..ops.inner import depthwise_conv
from ..ops.reference import accumulation_dtype
from .grid import GridSize, TokenGrid

__all__ = [
    'PATTERNS',
    'GatedMixer',
    'GatedRMSNorm',
    'MatrixMixer',
    'Mixer',
    'Patterns',
    'apply_matrix',
    'causal_conv',
    'check_arguments',
    'check_packing',
    'check_padding',
    'check_sizes',
    'convolved',
    'in_whole_columns',
    'is_plain',
    'is_unwatched',
    'keyword_arguments',
    'mask_projection',
    'rms_norm',
]


def apply_matrix(M: Tensor, v: Tensor) -> Tensor:
    """M (B or 1, H, L, L) times v (B, L, H, P), in the dtype of v. A matrix that all images share is not copied."""
    if M.shape[0] == 1:
        return torch.einsum('hij,bjhp->bihp', M[0].to(v.dtype), v)
    return (M.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)


def causal_conv(x: Tensor, weight: Tensor, bias: Optional[Tensor], reverse: bool = False) -> Tensor:
    """Depthwise convolution along L of the present and the d_conv - 1 tokens before it.

    Args:
        x: (B, L, C).
        weight: (C, 1, d_conv); the last column meets the present token.
        bias: (C,) or None.
        reverse: Of the tokens behind it, the last column still for the present one.

    Returns:
        (B, L, C), dtype of ``x``.
    """
    C, _, K = weight.shape
    if reverse:
        weight = weight.flip(-1)
    x = (
        F.pad(x, (0, 0, 0, K - 1) if reverse else (0, 0, K - 1, 0)).unsqueeze(1).permute(0, 3, 1, 2)
    )  # (B, C, 1, L + K - 1), channels last in memory
    y = F.conv2d(x, weight.to(x.dtype).unsqueeze(2), None if bias is None else bias.to(x.dtype), groups=C)
    return y.permute(0, 2, 3, 1).squeeze(1)


# what the weights of plain modules are, to people and to tracers
_PLAIN_WEIGHTS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


def is_unwatched(module: nn.Module, kind: Type[nn.Module]) -> bool:
    """Whether a module is exactly a ``kind`` and nothing expects it to be called: what wraps it, or a hook."""
    return (
        type(module) is kind
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and not _has_any_global_hook()
        and 'forward' not in module.__dict__
    )


def is_plain(module: nn.Module, kind: Type[nn.Module]) -> bool:
    """Whether a module is exactly a ``kind`` that nothing changes or watches: then its weights can stand for a call.

    What replaces or wraps it (an adapter, a parametrisation, a quantised layer or weight) computes something else, and
    a hook expects to be called.
    """
    # not module.weight: of torch.fx that is a proxy. FSDP keeps a flat parameter's weight among the attributes
    return (
        is_unwatched(module, kind)
        and type(module._parameters.get('weight', module.__dict__.get('weight'))) in _PLAIN_WEIGHTS
    )


def in_whole_columns(linear: nn.Module, u: Tensor) -> Tensor:
    """linear(u). On the CPU a plain one computes whole groups of 16 columns, and those too many are left out: for a
    width in between, MKL takes up to a third longer."""
    extra = -linear.weight.shape[0] % 16 if is_plain(linear, nn.Linear) and isinstance(u, Tensor) else 0
    if not extra or u.device.type != 'cpu' or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return linear(u)
    bias = None if linear.bias is None else F.pad(linear.bias, (0, extra))
    return F.linear(u, F.pad(linear.weight, (0, 0, 0, extra)), bias)[..., :-extra]


def convolved(conv: nn.Module, x: Tensor, causal: bool = False, reverse: bool = False) -> Tensor:
    """x (B, L, C) after a depthwise ``nn.Conv1d``: with its weights where it is plain, by a call where not.

    reverse: of a causal one, see ``causal_conv``.
    """
    if is_plain(conv, nn.Conv1d):
        if causal:
            return causal_conv(x, conv.weight, conv.bias, reverse)
        return depthwise_conv(x, conv.weight, conv.bias)
    x = x.flip(1) if reverse else x
    y = conv(x.transpose(-1, -2))[..., : x.shape[1]].transpose(-1, -2)  # its padding is on both sides
    return y.flip(1) if reverse else y


def keyword_arguments(cls: Type[nn.Module]) -> Dict[str, Any]:
    """Keyword arguments of a mixer class and of what it passes on, with defaults; without d_model, device and dtype."""
    found: Dict[str, Any] = {}
    for base in cls.__mro__:
        if '__init__' not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())
        for p in parameters[1:]:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in ('d_model', 'device', 'dtype'):
                found.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return {name: default for name, default in found.items() if name not in cls.hidden_arguments}


def check_arguments(title: str, cls: Type[nn.Module], given: Iterable[str]) -> None:
    """Raises TypeError for an argument that the mixer class does not take, with the nearest one."""
    allowed = keyword_arguments(cls)
    for argument in given:
        if argument not in allowed:
            raise TypeError(
                f'{title} takes no argument {argument!r}{nearest(argument, allowed)}; '
                f'it takes: {", ".join(sorted(allowed))}'
            )


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for a size below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f'{name}={value}; it must be at least 1')


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) over its root mean square along D, times weight (D,)."""
    if torch.jit.is_tracing():  # the ONNX exporter on top of it does not know the operator
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return F.rms_norm(x, weight.shape, weight, eps)


torch.fx.wrap('_gated_rms_norm')  # it asks for the dtype, which a proxy does not have


def _gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    acc = accumulation_dtype(z.dtype)
    return (rms_norm(y.to(acc), weight.to(acc), eps) * F.silu(z.to(acc))).to(z.dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm(y) * weight * SiLU(z). A plain one lends its weight to the operators that compute it fused."""

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y and z (B, L, dim) -> (B, L, dim), dtype of z; computed in float32, for float64 in float64."""
        return _gated_rms_norm(y, z, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f'{self.weight.shape[0]}, eps={self.eps}'


# Of the Comprehensive Attention Benchmark (Zhang et al., ICML 2023). Self: among the tokens u. Cross: from tokens
# ``memory`` to u. Causal: a token of u depends on no later token of u.
PATTERNS = ('noncausal self', 'causal self', 'noncausal cross', 'causal cross')
Patterns = Mapping[str, Mapping[str, Any]]  # the supported ones, with the arguments that each needs


def mask_projection(projected: Tensor, valid: Optional[Tensor], steps: int) -> Tensor:
    """Sets what a token that is padding may not tell others: its columns to zero, its step sizes to what gives zero.

    A convolution then sees at padding what it sees beyond the end of a sequence; a state neither changes nor decays.

    Args:
        projected: (B, L, D), what a projection makes of the tokens; the last columns are step sizes before softplus.
        valid: (B, L), False at padding, or None for no padding.
        steps: Number of the last columns.
    """
    if valid is None:
        return projected
    padding = projected.new_zeros(projected.shape[-1])
    padding[projected.shape[-1] - steps :] = -3e4  # softplus of it, with any bias, is exactly zero; float16 has it
    return torch.where(valid.unsqueeze(-1), projected, padding)


class Mixer(nn.Module):
    """Contract of a sequence mixer, (B, L, d_model) -> (B, L, d_model).

    ``forward(u)``, or ``forward(u, grid)`` where ``takes_grid``; ``forward(u, **padding_arguments(valid))`` where it
    can leave padding out, ``forward(u, **packing_arguments(cu_seqlens))`` where it knows borders; ``matrix(u)``, the
    matrix that it applies; and, for models, what it has to know of their tokens and which of its parameters are not
    decayed.
    """

    takes_grid = False  # whether forward takes the (H, W) of the patches
    needs_row_order = False  # whether the patches have to stand by rows
    hidden_arguments: ClassVar[Tuple[str, ...]] = ()  # of a parent class, fixed by this one
    patterns: ClassVar[Patterns] = {'noncausal self': {}}
    scriptable: ClassVar[bool] = False  # by torch.jit.script, and traced through by torch.fx

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.scriptable:
            register_notrace_module(cls)  # its shapes are Python numbers: torch.fx keeps the module as one node

    def __prepare_scriptable__(self):
        if self.scriptable:
            return self
        raise RuntimeError(
            f'{type(self).__name__} cannot be compiled by torch.jit.script; use torch.compile, torch.export or '
            "torch.jit.trace (mixer='hydra' can be scripted)"
        )

    @classmethod
    def layout_arguments(cls, kwargs: Mapping[str, Any]) -> Tuple[str, ...]:
        """Which of ``grid_size``, ``num_prefix_tokens`` and ``prefix_position`` a mixer with these arguments takes."""
        return ()

    @torch.jit.ignore
    def why_no_padding(self) -> Optional[str]:
        """None where the mixer takes ``valid``: (B, L), False at padding, which stands at the end of the sequence.

        What a valid token becomes is then what it would be alone, to rounding; what padding becomes has no meaning.
        Otherwise why it does not.
        """
        return f'{type(self).__name__} has no form that leaves padding out'

    @torch.jit.ignore
    def padding_arguments(self, valid: Tensor) -> Dict[str, Tensor]:
        """What ``forward`` takes beside the tokens for padding to be left out."""
        return {'valid': valid}

    @torch.jit.ignore
    def why_no_packing(self) -> Optional[str]:
        """None where the mixer takes ``cu_seqlens``: (sequences + 1,) borders of several sequences in one row, B = 1.

        What a token becomes is then what it would be with its own sequence alone, to rounding. Otherwise why it does
        not.
        """
        return f'{type(self).__name__} has no form for several sequences in one row'

    @torch.jit.ignore
    def packing_arguments(self, cu_seqlens: Tensor) -> Dict[str, Tensor]:
        """What ``forward`` takes beside the row of tokens for the sequences in it to stay apart."""
        return {'cu_seqlens': cu_seqlens}

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters, relative to this module, that should not use weight decay."""
        return set()

    @torch.jit.ignore
    def matrix(self, u: Tensor) -> Tensor:
        """The mixing matrix (B, H, L, L), for tests and pictures. float32, for float64 input float64."""
        raise NotImplementedError

    def grid_parameters(self) -> Tuple[str, ...]:
        """Names of the parameters that belong to the positions of ``self.tokens``."""
        return ()

    @torch.jit.ignore
    def resampled_parameters(self, grid_size: GridSize) -> Dict[str, Tensor]:
        """Values of the position parameters at another grid. The mixer stays as it is.

        Raises:
            ValueError: They cannot be resampled to it.
        """
        return {}

    @torch.jit.ignore
    def set_input_size(self, grid_size: GridSize) -> None:
        """Make the mixer one for another grid, with its position parameters resampled to it.

        Raises:
            ValueError: They cannot be resampled to it; the mixer stays as it was.
        """
        if self.takes_grid:
            self.tokens = self.tokens.resized(grid_size)


def check_padding(mixer: Mixer, argument: str = 'valid') -> None:
    """Raises ValueError for a mixer that does not take ``valid``."""
    reason = mixer.why_no_padding()
    if reason is not None:
        raise ValueError(f'{argument}: {reason}')


def check_packing(mixer: Mixer, argument: str = 'cu_seqlens') -> None:
    """Raises ValueError for a mixer that does not take ``cu_seqlens``."""
    reason = mixer.why_no_packing()
    if reason is not None:
        raise ValueError(f'{argument}: {reason}')


class GatedMixer(Mixer):
    """Mixer with an input projection, a depthwise convolution, a gated RMSNorm and an output projection.

    Args:
        d_model: Width of the tokens.
        expand: ``d_inner = expand * d_model``; need not be whole.
        headdim: Head width P; divides ``d_inner``. H = d_inner / headdim.
        d_conv: Width of the depthwise convolution; odd where it is centred.
        conv: 'centred', or 'causal' for a convolution that sees no token ahead.
        bias: Bias of the two projections.
        conv_bias: Bias of the convolution.

    Raises:
        ValueError: A size that does not fit.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 2,
        headdim: int = 64,
        d_conv: int = 7,
        conv: str = 'centred',
        bias: bool = False,
        conv_bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, headdim=headdim, d_conv=d_conv)
        if conv not in ('centred', 'causal'):
            raise ValueError(f"conv={conv!r}; allowed: 'centred', 'causal'")
        if conv == 'centred' and d_conv % 2 == 0:
            raise ValueError(f'd_conv={d_conv}; it must be odd, so that a centred convolution keeps the length')
        d_inner = round(expand * d_model)  # int() would take 1.14 * 100 for 113
        if d_inner < 1 or d_inner % headdim:
            raise ValueError(f'headdim={headdim} does not divide d_inner={d_inner} (expand * d_model)')
        self.d_model, self.d_inner, self.headdim, self.nheads = d_model, d_inner, headdim, d_inner // headdim
        self.d_conv, self.conv = d_conv, conv
        self._bias, self._conv_bias = bias, conv_bias

    def _build_input(self, conv_dim: int, plain_dim: int, **dd) -> None:
        """in_proj to z, ``conv_dim`` columns that are convolved and ``plain_dim`` that are not; conv1d."""
        self.in_proj = nn.Linear(self.d_model, self.d_inner + conv_dim + plain_dim, bias=self._bias, **dd)
        padding = self.d_conv // 2 if self.conv == 'centred' else self.d_conv - 1
        self.conv1d = nn.Conv1d(
            conv_dim, conv_dim, self.d_conv, groups=conv_dim, padding=padding, bias=self._conv_bias, **dd
        )

    def _build_output(self, **dd) -> None:
        """norm and out_proj."""
        self.norm = GatedRMSNorm(self.d_inner, **dd)
        self.out_proj = nn.Linear(self.d_inner, self.d_model, bias=self._bias, **dd)


class MatrixMixer(GatedMixer):
    """Base of the family: the gated wrapper around M v.

    A class says how wide its extras are (``_build``), and gives ``mix`` and ``dense``.

    Args:
        d_model: Width of the tokens.
        data_dependent: Whether M depends on the tokens.
        grid_size: (H, W) patches, or a number of tokens, for which a data-independent matrix has parameters; needed
            there and nowhere else.
        num_prefix_tokens: Class and register tokens next to the patches (with ``grid_size``).
        prefix_position: Where they stand: 'first', 'middle' or 'last'.
        **wrapper: As in ``GatedMixer``.

    Raises:
        ValueError: A size that does not fit, a ``grid_size`` that is missing or has no use.
    """

    # whether parameters belong to positions: 'never', 'always', or 'if data-independent'
    position_parameters: ClassVar[str] = 'if data-independent'
    silu_extras: ClassVar[bool] = True
    maskable: ClassVar[bool] = False  # whether ``mix``, data-dependent, takes ``valid``

    def __init__(
        self,
        d_model: int,
        data_dependent: bool,
        /,
        *,
        grid_size: Optional[GridSize] = None,
        num_prefix_tokens: int = 0,
        prefix_position: str = 'first',
        device=None,
        dtype=None,
        **wrapper,
    ) -> None:
        super().__init__(d_model, device=device, dtype=dtype, **wrapper)
        self.data_dependent = data_dependent
        self.takes_grid = bool(self.layout_arguments({'data_dependent': data_dependent}))
        if self.takes_grid and grid_size is None:
            raise ValueError(
                f'{type(self).__name__}: a data-independent matrix has parameters per token and needs '
                'grid_size=(H, W) or a number of tokens'
            )
        without_use = grid_size is not None or num_prefix_tokens or prefix_position != 'first'
        if without_use and not self.takes_grid:
            raise ValueError(
                f'{type(self).__name__}: grid_size={grid_size}, num_prefix_tokens={num_prefix_tokens}, '
                f'prefix_position={prefix_position!r}; nothing in this mixer depends on the number of tokens, leave '
                'them out'
            )
        self.tokens = TokenGrid(grid_size, num_prefix_tokens, prefix_position) if self.takes_grid else None
        self._factory = {'device': device, 'dtype': dtype}

    @classmethod
    def layout_arguments(cls, kwargs: Mapping[str, Any]) -> Tuple[str, ...]:
        data_dependent = kwargs.get('data_dependent', cls.position_parameters != 'always')
        if cls.position_parameters == 'never' or (cls.position_parameters != 'always' and data_dependent):
            return ()
        return ('grid_size', 'num_prefix_tokens', 'prefix_position')

    def _build(self, conv_extras: int = 0, plain_extras: int = 0, v_heads: Optional[int] = None) -> None:
        """Projections, convolution and norm for this many extra columns with and without convolution."""
        self.conv_extras, self.plain_extras = conv_extras, plain_extras
        self.v_heads = self.nheads if v_heads is None else v_heads
        dd = self._factory
        del self._factory
        self._build_input(self.v_heads * self.headdim + conv_extras, plain_extras, **dd)
        self._build_output(**dd)

    def no_weight_decay(self) -> Set[str]:
        """Parameters, relative to this module, that should not use weight decay: those that belong to a position."""
        return set(self.grid_parameters())

    def why_no_padding(self) -> Optional[str]:
        if self.maskable and self.data_dependent:
            return None
        return super().why_no_padding()

    def forward(
        self,
        u: Tensor,
        grid: Optional[Tuple[int, int]] = None,
        memory: Optional[Tensor] = None,
        valid: Optional[Tensor] = None,
    ) -> Tensor:
        """Mix the tokens.

        Args:
            u: Tokens (B, L, d_model).
            grid: (H, W) of the patches where they are not those that the mixer has parameters for. Only mixers with
                ``takes_grid`` have a use for it.
            memory: Tokens (B, any length, d_model) to mix into u, instead of u itself: only mixers with a cross pattern
                (``patterns``).
            valid: (B, L), False at padding, see ``why_no_padding``; without ``memory``.

        Returns:
            (B, L, d_model).

        Raises:
            ValueError: L or ``grid`` does not fit, the mixer has no cross pattern or does not take ``valid``.
        """
        if valid is not None:
            check_padding(self)
            if memory is not None:
                raise ValueError('valid: it masks the tokens u, not those of a memory; give one of the two')
        tokens = self._check_grid(u.shape[1], grid)
        projected = mask_projection(in_whole_columns(self.in_proj, u), valid, self.plain_extras)
        z, v, extras = self._unpack(projected)
        if memory is None:
            masked = {} if valid is None else {'valid': valid}
            y = self.mix(v, extras, tokens, **masked)
        else:
            _, v_memory, extras_memory = self._unpack(self.in_proj(memory))
            y = self.mix_memory(extras, v_memory, extras_memory)
        return self.out_proj(self.norm(self.add_residual(y, v).flatten(-2), z))

    def _unpack(self, projected: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """z (B, L, d_inner), v (B, L, H, P) and extras (B, L, conv_extras + plain_extras), convolution done."""
        v_dim = self.v_heads * self.headdim
        z, vx, plain = projected.split([self.d_inner, v_dim + self.conv_extras, self.plain_extras], dim=-1)
        vx = convolved(self.conv1d, vx, self.conv == 'causal')
        if self.silu_extras:
            vx = F.silu(vx)
        v, extras = vx.split([v_dim, self.conv_extras], dim=-1)
        if not self.silu_extras:
            v = F.silu(v)
        if self.plain_extras:
            extras = torch.cat([extras, plain], dim=-1)
        return z, v.unflatten(-1, (self.v_heads, self.headdim)), extras

    def _check_grid(self, L: int, grid: Optional[Tuple[int, int]]) -> Optional[TokenGrid]:
        """The tokens of this input; None for a mixer that does not depend on their number."""
        if not self.takes_grid:
            if grid is not None:
                raise ValueError(f'{type(self).__name__}: grid={grid}; this mixer takes any length and no grid')
            return None
        tokens = self.tokens if grid is None else self.tokens.resized(grid)
        if tokens.num_tokens != L:
            how = ' (for another size, pass grid=(H, W))' if grid is None else ''
            raise ValueError(f'{type(self).__name__}: L={L} tokens; {tokens} are {tokens.num_tokens}{how}')
        return tokens

    def mix(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        """M v, as fast as the structure allows. v (B, L, H, P) -> (B, L, H, P)."""
        raise NotImplementedError

    def mix_memory(self, extras: Tensor, v: Tensor, extras_memory: Tensor) -> Tensor:
        """M v for the extras of u and v (B, L_memory, H, P) and extras of the memory: (B, L, H, P)."""
        raise ValueError(f'memory: {type(self).__name__} with these arguments mixes tokens with themselves only')

    def add_residual(self, y: Tensor, v: Tensor) -> Tensor:
        """What leaves the mixer: M v and v."""
        return y + v

    def dense(self, v: Tensor, extras: Tensor, tokens: Optional[TokenGrid]) -> Tensor:
        """M itself, (B or 1, H, L, L)."""
        raise NotImplementedError

    def matrix(self, u: Tensor, grid: Optional[Tuple[int, int]] = None) -> Tensor:
        """The mixing matrix M (B, H, L, L) that this module applies to its v, without the residual.

        For tests and pictures: O(L^2) memory. float32, for float64 input float64.
        """
        projected = self.in_proj(u)
        tokens = self._check_grid(u.shape[1], grid)
        _, v, extras = self._unpack(projected)
        M = self.dense(v, extras, tokens).to(accumulation_dtype(projected.dtype))
        return M.expand(u.shape[0], *M.shape[1:])

    def resample(self, name: str, value: Tensor, old: TokenGrid, new: TokenGrid) -> Tensor:
        """The parameter ``name`` for the tokens ``new``, given its value for the tokens ``old``."""
        raise NotImplementedError

    def old_tokens(self, name: str, value: Tensor) -> Optional[TokenGrid]:
        """The tokens to which a parameter of a checkpoint belongs, as far as its shape says; None if it does not."""
        return self.tokens.from_num_tokens(value.shape[0])

    def _at(self, name: str, tokens: TokenGrid) -> Tensor:
        return self.resample(name, getattr(self, name), self.tokens, tokens)

    @torch.no_grad()
    def resampled_parameters(self, grid_size: GridSize) -> Dict[str, Tensor]:
        new = self.tokens.resized(grid_size)
        return {name: self._at(name, new).clone() for name in self.grid_parameters()}

    @torch.no_grad()
    def set_input_size(self, grid_size: GridSize) -> None:
        if self.takes_grid:
            for name, value in self.resampled_parameters(grid_size).items():
                setattr(self, name, nn.Parameter(value, requires_grad=getattr(self, name).requires_grad))
        super().set_input_size(grid_size)

    def extra_repr(self) -> str:
        text = f'headdim={self.headdim}, nheads={self.nheads}, data_dependent={self.data_dependent}'
        return text if self.tokens is None else f'{text}, tokens={self.tokens!r}'
