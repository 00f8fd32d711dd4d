"""AITER, AMD's production library, behind typed adapters: support matrix, contract, and an emulation to test with.

`support` says which shapes have a kernel, `contract` which signatures the adapters were written for, `library` finds
the genuine package, `adapters` and `operators` call it with named buffers, `emulation` stands in for its persistent
decode where there is no AMD GPU. The genuine library is not needed to import any of this.
"""
