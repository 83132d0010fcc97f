"""Losses of PIPO training: pure functions of hidden states and a head. Sections 3.1 and 3.2 of the paper."""
