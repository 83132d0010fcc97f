"""Engines of others on the same weights and prompts: Hugging Face `generate`, vLLM, SGLang, llama.cpp. See docs/benchmarking.md.

Each runs in a process of its own, by an interpreter whose environment has it (`workers/`).
"""

from pipo.bench.peers.contest import PeerSubject, open_peers
from pipo.bench.peers.peer import PEERS, Peer, choose_peers
from pipo.bench.peers.process import PeerProcess, Reply, Task

__all__ = ["PEERS", "Peer", "PeerProcess", "PeerSubject", "Reply", "Task", "choose_peers", "open_peers"]
