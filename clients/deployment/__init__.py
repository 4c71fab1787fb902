"""Clients on machines of their own: what `fedsim serve` and `fedsim join` say to each other, and how it travels through Flower.

handshake.py   what a server offers and a node answers before it trains, as plain values
guests.py      at the server: who is there, and as which client
superlink.py   at the server: Flower's SuperLink as a process, and what is sent through it
supernode.py   at a node: its line to the SuperLink
node.py        at a node: answer offers, train, keep what the client remembers
memory.py      at a node: what its client remembers, in a folder
"""
