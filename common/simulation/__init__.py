"""The mesh in virtual time: real cores, real policy and protocol, and a world of faults drawn from one seed.

A seed gives one schedule, always the same: what fails can be replayed and read line by line. Nothing here awaits, and no
clock is read.
"""
