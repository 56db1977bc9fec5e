"""Goodput in virtual time: the mesh's own policies over modelled steps, a million requests in less than a minute."""
