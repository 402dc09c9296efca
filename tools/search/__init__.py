"""`search`: BM25 over a local corpus, or a search service."""

from agentloop.tools.search.tool import Search

__all__ = ["Search"]
