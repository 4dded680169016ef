"""READ's recurrent cell over depth, and its hand-written backward, which keeps nothing of the gates' width.

Legend: T tokens, D width of the hidden states, J width of what is joined to them, X = D + J, K size of the
recurrence, G rows of all gates (1, 3 or 4 times K).

Forward (arXiv 2305.15348), block after block and for each token alone:  h_j = R(RMSNorm([phi_j ; c_j]), h_{j-1}),
where R is torch's RNN, GRU or LSTM cell. With x = [phi ; c], rho_T = 1 / sqrt(mean x^2 + eps) and the folded
W_GX = weight_ih * norm_weight,
    gx_TG = rho (phi W_phi' + c W_c') + bias_ih        gh_TG = h W_hh' + bias_hh
and then the cell's formula in fp32, rounded once. Neither [phi ; c] nor its norm is ever formed.

Backward: the formula gives the gradients dgx and dgh of gx and gh. With ds = rho dgx, y = gx - bias_ih, and
u_T = the sum of dgx y over the gates,
    M_GX = ds' x       dweight_ih = M * norm_weight      dnorm_weight = column sums of M * weight_ih
    dbias_ih = sum dgx      dbias_hh = sum dgh      dweight_hh = dgh' h
    dc = ds W_c - (rho^2 u / X) c       dh = dgh W_hh + what the formula passes on       (dphi as dc, if asked for)

What is saved is phi and c in the compute dtype, the state before, which is the output of the step before, and the
RNN's own output, since tanh' = 1 - h^2: so (D + J + K) numbers a token and block, and no gradient of T x D is made.
rho and the gates of GRU and LSTM are formed again. The RNN does not need phi W' again, not even for u: there
y = atanh(h) - gh - bias_ih, and where h is so near 1 that atanh of its rounded value is poor, dgx is as small.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.errors import ConfigError
from trimtab.nn.lowrank import draw_a
from trimtab.nn.precision import column_sum, product, square_sums, sum_over_tokens, wide, without_autocast

Context = Any

Cell = Literal["rnn", "gru", "lstm"]
CELLS: tuple[Cell, ...] = get_args(Cell)
#: Gates of a cell: its weights have this many times `size` rows.
GATES: dict[Cell, int] = {"rnn": 1, "gru": 3, "lstm": 4}

#: (h,), or (h, c) for an LSTM, each (..., size).
State = tuple[Tensor, ...]

#: g f'(z), given y = f(z).
_sigmoid_backward: Any = torch.ops.aten.sigmoid_backward.default
_tanh_backward: Any = torch.ops.aten.tanh_backward.default


class Prepared(NamedTuple):
    """What one forward of the model forms once from a cell's parameters, detached.

    Attributes:
        weight_ih: W (G, X), the norm's weight folded in, in the compute dtype.
        weight_hh: (G, K) in the compute dtype.
        bias_ih: (G,) in fp32 or wider, as is `bias_hh`.
        bias_hh: (G,).
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.weight_ih.dtype


def _inverse_rms(phi_TD: Tensor, c_TJ: Tensor | None, eps: float) -> Tensor:
    """rho (T, 1) of [phi ; c]."""
    total = square_sums(phi_TD)
    if c_TJ is None:
        return total.div_(phi_TD.shape[1]).add_(eps).rsqrt_()
    return total.add_(square_sums(c_TJ)).div_(phi_TD.shape[1] + c_TJ.shape[1]).add_(eps).rsqrt_()


def _normed_product(phi_TD: Tensor, c_TJ: Tensor | None, rho_T1: Tensor, folded: Prepared) -> Tensor:
    """y (T, G) = rho (phi W_phi' + c W_c'), in fp32 or wider."""
    d = phi_TD.shape[1]
    s_TG = product(phi_TD, folded.weight_ih[:, :d].t()).to(rho_T1.dtype)
    if c_TJ is not None:
        s_TG.add_(product(c_TJ, folded.weight_ih[:, d:].t()))
    return s_TG.mul_(rho_T1)


def _activate(kind: Cell, gx_TG: Tensor, h_TK: Tensor | None, folded: Prepared) -> Tensor | None:
    """Turn gx into the gates' values, in place; returns what GRU's reset gate multiplies.

    Without a state, h is 0 and the product with W_hh is left out.
    """
    bias, gh_TG = folded.bias_hh, None if h_TK is None else product(h_TK, folded.weight_hh.t())
    k = gx_TG.shape[1] // GATES[kind]
    both = 2 * k if kind == "gru" else gx_TG.shape[1]  # columns in which gx + gh is all that counts
    sums = gx_TG[:, :both].add_(bias[:both])
    if gh_TG is not None:
        sums.add_(gh_TG[:, :both])
    if kind == "rnn":
        sums.tanh_()
        return None
    if kind == "gru":  # r, z, n
        sums.sigmoid_()
        inner = bias[both:] if gh_TG is None else gh_TG[:, both:] + bias[both:]
        gx_TG[:, both:].addcmul_(gx_TG[:, :k], inner).tanh_()
        return inner
    sums[:, : 2 * k].sigmoid_()  # i, f
    sums[:, 2 * k : 3 * k].tanh_()  # g
    sums[:, 3 * k :].sigmoid_()  # o
    return None


def _lstm_cell(gates_TG: Tensor, c_TK: Tensor | None) -> Tensor:
    """The new cell state f c + i g, not rounded yet."""
    i, f, g, _ = gates_TG.chunk(4, 1)
    return i * g if c_TK is None else (i * g).addcmul_(f, c_TK.to(f.dtype))


def _gru_backward(gates_TG: Tensor, inner: Tensor, h_TK: Tensor | None, dh_TK: Tensor) -> tuple[Tensor, Tensor]:
    """dgx (T, G), and what goes to h past the gates."""
    r, z, n = gates_TG.chunk(3, 1)
    dn = _tanh_backward(dh_TK * (1 - z), n)
    dz = _sigmoid_backward(dh_TK * (-n if h_TK is None else h_TK - n), z)
    return torch.cat((_sigmoid_backward(dn * inner, r), dz, dn), 1), dh_TK * z


def _lstm_backward(gates_TG: Tensor, c_TK: Tensor | None, dh_TK: Tensor, dc_TK: Tensor) -> tuple[Tensor, Tensor]:
    """dgx (T, G), and the gradient of the cell state before."""
    i, f, g, o = gates_TG.chunk(4, 1)
    t = _lstm_cell(gates_TG, c_TK).tanh_()
    dc = _tanh_backward(dh_TK * o, t).add_(dc_TK)
    df = torch.zeros_like(f) if c_TK is None else _sigmoid_backward(dc * c_TK.to(dc.dtype), f)
    parts = _sigmoid_backward(dc * g, i), df, _tanh_backward(dc * i, g), _sigmoid_backward(dh_TK * t, o)
    return torch.cat(parts, 1), dc.mul_(f)


class _CellFunction(torch.autograd.Function):
    """See the module. Returns h, and for an LSTM (h, c), in phi's dtype."""

    @staticmethod
    def forward(
        ctx: Context,
        phi: Tensor,
        joined: Tensor | None,
        h: Tensor | None,
        c: Tensor | None,
        norm_weight: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        folded_ih: Tensor,
        folded_hh: Tensor,
        folded_bias_ih: Tensor,
        folded_bias_hh: Tensor,
        kind: Cell,
        eps: float,
    ) -> Tensor | State:
        ctx.kind, ctx.eps = kind, eps
        ctx.dtypes = (weight_hh.dtype, bias_ih.dtype, bias_hh.dtype)
        # Kept as they are, not as saved tensors: they belong to the model, once for all its blocks.
        ctx.folded = (folded_ih, folded_hh, folded_bias_ih, folded_bias_hh)
        folded = Prepared(folded_ih, folded_hh, folded_bias_ih, folded_bias_hh)
        gates_TG = _normed_product(phi, joined, _inverse_rms(phi, joined, eps), folded).add_(folded.bias_ih)
        _activate(kind, gates_TG, h, folded)
        if kind == "rnn":
            new_h = gates_TG.to(phi.dtype)
            ctx.save_for_backward(phi, joined, h, None, new_h, norm_weight, weight_ih)
            return new_h
        ctx.save_for_backward(phi, joined, h, c, None, norm_weight, weight_ih)
        if kind == "gru":
            _, z, n = gates_TG.chunk(3, 1)
            return (n - z * n if h is None else torch.lerp(n, h.to(n.dtype), z)).to(phi.dtype)
        new_c = _lstm_cell(gates_TG, c)
        return (new_c.tanh() * gates_TG.chunk(4, 1)[3]).to(phi.dtype), new_c.to(phi.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        with without_autocast(grads[0].device.type):
            return *_backward(ctx, *grads), *(None,) * 6


def _through_formula(
    ctx: Context, rho_T1: Tensor, dh_TK: Tensor, dnew_TK: Tensor | None, need_y: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dgx (T, G); n's part of dgh where it differs (GRU); h's gradient beside W_hh's; c's gradient; y if asked for."""
    phi, joined, h, c, new_h, *_ = ctx.saved_tensors
    folded, k = Prepared(*ctx.folded), dh_TK.shape[1]
    if ctx.kind == "rnn":
        new_h = new_h.to(rho_T1.dtype)
        y_TG = None
        if need_y:
            below_one = 1 - torch.finfo(phi.dtype).eps / 2
            y_TG = new_h.clamp(-below_one, below_one).atanh_().sub_(folded.bias_ih).sub_(folded.bias_hh)
            y_TG = y_TG if h is None else y_TG.sub_(product(h, folded.weight_hh.t()))
        return _tanh_backward(dh_TK, new_h), None, None, None, y_TG
    y_TG = _normed_product(phi, joined, rho_T1, folded)
    gates_TG = y_TG + folded.bias_ih if need_y else y_TG.add_(folded.bias_ih)
    inner = _activate(ctx.kind, gates_TG, h, folded)
    if ctx.kind == "gru":
        assert inner is not None
        dgx_TG, past_TK = _gru_backward(gates_TG, inner, h, dh_TK)
        return dgx_TG, dgx_TG[:, 2 * k :] * gates_TG[:, :k], past_TK, None, y_TG if need_y else None
    assert dnew_TK is not None
    dgx_TG, dc_TK = _lstm_backward(gates_TG, c, dh_TK, dnew_TK)
    return dgx_TG, None, None, dc_TK, y_TG if need_y else None


def _backward(ctx: Context, dh_TK: Tensor, dnew_TK: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """The gradients of the first nine inputs."""
    phi, joined, h, _, _, norm_weight, weight_ih = ctx.saved_tensors
    folded, dtype, d, k = Prepared(*ctx.folded), phi.dtype, phi.shape[1], dh_TK.shape[1]
    need_phi, need_joined, need_h, need_c, need_norm, need_ih, need_hh, need_bias_ih, need_bias_hh = (
        ctx.needs_input_grad[:9]
    )
    rho_T1 = _inverse_rms(phi, joined, ctx.eps)
    dgx_TG, dinner_TK, past_TK, dc, y_TG = _through_formula(
        ctx, rho_T1, dh_TK.to(rho_T1.dtype), dnew_TK, need_phi or need_joined
    )
    dphi = djoined = dh = dnorm = dih = dhh = None
    hh_dtype, bias_ih_dtype, bias_hh_dtype = ctx.dtypes
    total_G = column_sum(dgx_TG, rho_T1.dtype)
    dbias_ih = total_G.to(bias_ih_dtype, copy=True) if need_bias_ih else None
    if dinner_TK is not None:
        total_G[-k:] = dinner_TK.sum(0)
    dbias_hh = total_G.to(bias_hh_dtype) if need_bias_hh else None
    if h is not None and (need_hh or need_h):
        dgh_TG = dgx_TG.to(dtype, copy=dinner_TK is not None)
        if dinner_TK is not None:
            dgh_TG[:, -k:] = dinner_TK
        dhh = sum_over_tokens(dgh_TG, h).to(hh_dtype) if need_hh else None
        if need_h:
            dh = product(dgh_TG, folded.weight_hh)
            dh = (dh if past_TK is None else past_TK.add_(dh)).to(dtype)
    rate_T1 = None
    if y_TG is not None:
        rate_T1 = y_TG.mul_(dgx_TG).sum(1, keepdim=True).mul_(rho_T1.square()).div_(-weight_ih.shape[1])
    # fp16 has no room for a small rho, so the largest is taken out of the products and put in after them.
    top = rho_T1.amax() if dtype == torch.float16 and len(rho_T1) else None
    ds_TG = dgx_TG.mul_(rho_T1 if top is None else rho_T1 / top).to(dtype)
    if need_norm or need_ih:
        m_GX = sum_over_tokens(ds_TG, phi).to(rho_T1.dtype)
        if joined is not None:
            m_GX = torch.cat((m_GX, sum_over_tokens(ds_TG, joined).to(rho_T1.dtype)), 1)
        m_GX = m_GX if top is None else m_GX.mul_(top)
        dnorm = (m_GX * weight_ih).sum(0).to(norm_weight.dtype) if need_norm else None
        dih = m_GX.mul_(norm_weight).to(weight_ih.dtype) if need_ih else None
    if rate_T1 is not None:
        dphi = _input_gradient(phi, ds_TG, folded.weight_ih[:, :d], rate_T1, top) if need_phi else None
        djoined = _input_gradient(joined, ds_TG, folded.weight_ih[:, d:], rate_T1, top) if need_joined else None
    return dphi, djoined, dh, dc.to(dtype) if dc is not None and need_c else None, dnorm, dih, dhh, dbias_ih, dbias_hh


def _input_gradient(x: Tensor, ds_TG: Tensor, weight: Tensor, rate_T1: Tensor, top: Tensor | None) -> Tensor:
    """The gradient of phi or c: ds W - (rho^2 u / X) x, rounded once."""
    straight = product(ds_TG, weight)
    return (x * rate_T1).add_(straight if top is None else straight * top).to(x.dtype)


class DepthCell(nn.Module):
    """One step over depth: h_j = R(RMSNorm([phi_j ; c_j]), h_{j-1}), for each token alone.

    Source: arXiv 2305.15348. R is torch's RNNCell (tanh), GRUCell or LSTMCell, with its formula and order of gates.
    A model's blocks share one cell; its parameters are fp32, or 16-bit where everything is.

    Args:
        width: D of the hidden states phi.
        size: K of the recurrence.
        kind: the cell.
        joined: J of what is joined to phi; 0 for nothing.
        eps: of the norm.
        generator: the CPU's, from which the weights are drawn; None is torch's own.
        device: of the parameters. On "meta" nothing is drawn.
        dtype: of the parameters.

    Attributes:
        norm_weight: (X,) with X = D + J; starts at 1.
        weight_ih: (G, X) with G = K times 1 (rnn), 3 (gru) or 4 (lstm); starts at U(-1/sqrt(X), 1/sqrt(X)).
        weight_hh: (G, K); starts at U(-1/sqrt(K), 1/sqrt(K)).
        bias_ih: (G,); starts at 0, the LSTM's forget gate at 1.
        bias_hh: (G,); starts at 0.

    Raises:
        ConfigError: a size is below its least, or there is no such cell.
    """

    def __init__(
        self,
        width: int,
        size: int,
        *,
        kind: Cell = "rnn",
        joined: int = 0,
        eps: float = 1e-6,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if kind not in CELLS:
            raise ConfigError(f"cell = {kind!r} is not known; use one of {', '.join(CELLS)}")
        for name, value, least in (("width", width, 1), ("size", size, 1), ("joined", joined, 0)):
            if value < least:
                raise ConfigError(f"{name} = {value} of a recurrent cell is below {least}; give at least {least}")
        self.width, self.size, self.kind, self.joined, self.eps = width, size, kind, joined, eps
        rows, inputs = GATES[kind] * size, width + joined

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.norm_weight = parameter(inputs)
        self.weight_ih = parameter(rows, inputs)
        self.weight_hh = parameter(rows, size)
        self.bias_ih = parameter(rows)
        self.bias_hh = parameter(rows)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the parameters anew, on the CPU, so that they are the same on every device."""
        self.norm_weight.fill_(1)
        draw_a(self.weight_ih, generator)
        draw_a(self.weight_hh, generator)
        self.bias_ih.zero_()
        self.bias_hh.zero_()
        if self.kind == "lstm":
            self.bias_ih[self.size : 2 * self.size].fill_(1)

    def prepare(self, dtype: torch.dtype) -> Prepared:
        """Fold the norm's weight into `weight_ih`, rounded once, and cast the rest, to compute in `dtype`.

        For one forward of the model: what it gives is detached, and of the parameters as they are now.
        """
        with torch.no_grad():
            exact = torch.promote_types(wide(self.weight_ih.dtype), dtype)
            folded = (self.weight_ih.to(exact) * self.norm_weight.to(exact)).to(dtype)
            biases = self.bias_ih.detach().to(wide(dtype)), self.bias_hh.detach().to(wide(dtype))
            return Prepared(folded, self.weight_hh.detach().to(dtype), *biases)

    def forward(self, phi: Tensor, joined: Tensor | None, state: State | None, prepared: Prepared) -> State:
        """The state after a block, in the prepared dtype, to which every input is cast.

        Args:
            phi: (..., D), the block's output. Frozen as a rule; where it requires a gradient it gets one.
            joined: (..., J), or None where J is 0.
            state: what the block before gave, (h,) or (h, c), each (..., K); None at the first block stands for
                zeros, and costs no product with `weight_hh`, which then gets no gradient here.
            prepared: of `prepare`, in this forward of the model.

        Returns:
            (h,), or (h, c) for an LSTM, each (..., K).

        Raises:
            ValueError: a shape does not fit; the message names it.
        """
        h, c = self._checked(phi, joined, state)
        dtype = prepared.dtype

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype).reshape(-1, x.shape[-1])

        own = (self.norm_weight, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        with without_autocast(phi.device.type):
            inputs = (rows(phi), rows(joined), rows(h), rows(c))
            out: Tensor | State = _CellFunction.apply(*inputs, *own, *prepared, self.kind, self.eps)  # type: ignore[no-untyped-call]
        shape = (*phi.shape[:-1], self.size)
        return (out.view(shape),) if isinstance(out, Tensor) else tuple(part.view(shape) for part in out)

    def _checked(self, phi: Tensor, joined: Tensor | None, state: State | None) -> tuple[Tensor | None, Tensor | None]:
        """h and c of the state, once all shapes fit."""
        h, c = (*(state or ()), None, None)[:2]
        for name, x, last in (
            ("phi", phi, self.width),
            ("joined", joined, self.joined),
            ("h of the state", h, self.size),
            ("c of the state", c, self.size),
        ):
            if x is not None and x.shape != (*phi.shape[:-1], last):
                raise ValueError(f"{name} is {tuple(x.shape)}, where this cell needs {(*phi.shape[:-1], last)}")
        if (joined is None) != (self.joined == 0):
            needed = f"a tensor of {self.joined} numbers a token" if self.joined else "None"
            raise ValueError(f"joined is {'None' if joined is None else 'a tensor'}, where this cell needs {needed}")
        if state is not None and len(state) != (2 if self.kind == "lstm" else 1):
            raise ValueError(f"a state of cell={self.kind!r} is {'(h, c)' if self.kind == 'lstm' else '(h,)'}")
        return h, c

    def extra_repr(self) -> str:
        joined = f", joined={self.joined}" if self.joined else ""
        return f"{self.width}, {self.size}, kind={self.kind!r}{joined}"
