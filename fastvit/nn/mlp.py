"""The MLPs of a ViT block."""

from __future__ import annotations

from torch import Tensor, nn

from fastvit import ops
from fastvit.nn._listeners import can_bypass, kinds_inside
from fastvit.nn._spelling import activation_name, make_activation, norm_arguments


def add_branch(
    x: Tensor,
    linear: nn.Linear,
    drop: nn.Dropout,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
) -> Tensor:
    """residual + drop_path * layer_scale * drop(linear(x)): one operator, unless dropout stands in between."""
    if not (drop.training and drop.p > 0.0):
        return ops.linear_residual(
            x, linear.weight, linear.bias, residual=residual, layer_scale=layer_scale, drop_path=drop_path
        )
    y = drop(ops.norm_linear(x, linear.weight, linear.bias, norm="none"))
    if layer_scale is not None:
        y = y * layer_scale
    if drop_path is not None:
        y = y * drop_path.view(-1, *[1] * (y.ndim - 1))
    return residual + y


class MLP(nn.Module):
    """linear, activation, linear.  Keys as timm's Mlp: `fc1`, `fc2`.

    Args:
        in_features: D.
        hidden_features: width between, 4 D by default.
        out_features: D by default.
        act_layer: "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", or a module class.
        bias: give both linears a bias.
        drop: dropout probability in training, after the activation and at the end.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: str | type[nn.Module] = "gelu",
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or 4 * in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = make_activation(act_layer)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias)
        self.drop2 = nn.Dropout(drop)
        self._kinds = kinds_inside(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if not can_bypass(self, self._kinds):
            return self.drop2(self.fc2(self.drop1(self.activate(self.fc1(x)))))
        hidden = self.hidden(x, nn.Identity())
        return self.drop2(ops.norm_linear(hidden, self.fc2.weight, self.fc2.bias, norm="none"))

    def add_to(
        self,
        residual: Tensor,
        norm: nn.Module,
        layer_scale: Tensor | None = None,
        drop_path: Tensor | None = None,
    ) -> Tensor:
        """residual + drop_path * layer_scale * self(norm(residual)): one operator where it says all of it."""
        arguments, activation = norm_arguments(norm, residual.dtype), self.activation()
        dropping = any(drop.training and drop.p > 0.0 for drop in (self.drop1, self.drop2))
        if arguments is not None and activation is not None and not dropping:
            weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
            return ops.mlp(
                residual, *weights, activation=activation, layer_scale=layer_scale, drop_path=drop_path, **arguments
            )
        hidden = self.hidden(residual, norm)
        return add_branch(hidden, self.fc2, self.drop2, residual, layer_scale, drop_path)

    def activate(self, x: Tensor) -> Tensor:
        """What comes between fc1 and fc2, dropout apart."""
        return self.act(x)

    def activation(self) -> str | None:
        """The activation's name in the operators, or None for a module that they don't know."""
        return activation_name(self.act)

    def hidden(self, x: Tensor, norm: nn.Module) -> Tensor:
        """act(fc1(norm(x))), with dropout: (..., hidden_features)."""
        arguments = norm_arguments(norm, x.dtype)
        if arguments is None:
            x, arguments = norm(x), {"norm": "none"}
        activation = self.activation()
        x = ops.norm_linear(x, self.fc1.weight, self.fc1.bias, activation=activation or "none", **arguments)
        return self.drop1(x if activation else self.act(x))


class SwiGLU(MLP):
    """silu(gate) * value between two linears (Shazeer 2020), `fc1` packing [gate; value] in its rows.

    Args:
        in_features: D.
        hidden_features: rows of `fc1`, gate and value together; `fc2` takes half of them.
        out_features, bias, drop: as in `MLP`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        hidden_features = hidden_features or 8 * in_features
        if hidden_features % 2:
            raise ValueError(f"hidden_features: {hidden_features}; accepted: an even number, gate and value together")
        super().__init__(in_features, hidden_features, out_features, "silu", bias, drop)
        self.fc2 = nn.Linear(hidden_features // 2, out_features or in_features, bias=bias)

    def activate(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return self.act(gate) * value

    def activation(self) -> str:
        return "swiglu"
