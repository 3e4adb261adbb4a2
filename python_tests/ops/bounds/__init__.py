# SPDX-License-Identifier: BSD-3-Clause
"""How far an op's results may lie from the exact ones: derived from its arithmetic, for any order of summation and any
vector width.

Every bound is a function of the inputs and of the gradients of the outputs. It evaluates the op in float64 and carries,
beside every intermediate result, the largest error that rounding can have given it (Higham, Accuracy and Stability of
Numerical Algorithms, chapter 3). Nothing in it depends on how well a reference, a BLAS or a processor rounds. What the
forms of the kernels add to the plain formula (running softmax, distances by products, RᵀR) is derived where it is used.
"""
