"""A quadratic activation, z^2, and its symmetry: (q z)^2 = q^2 z^2 for every q but 0.

    scalegmn zoo cnn --import tests/extending/square.py --mixed true --activations [square] ...
    scalegmn train generalization --import tests/extending/square.py --scalegmn_args.symmetry hetero ...

A neuron's incoming weights and bias may be multiplied by any q; its outgoing weights are then divided by
chi(q) = q^2 = sign(q)^0 |q|^2.
"""

from scalegmn.networks import Activation, ScalarGroup, register_activation

register_activation(
    Activation(
        "square",
        function=lambda z, w0: z.square(),
        group=ScalarGroup(signs=True, scales=True, sign_exponent=0, exponent=2),
    )
)
