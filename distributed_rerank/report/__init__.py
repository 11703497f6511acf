"""The report of one evaluation: a single HTML file that opens from disk, without a network."""

from distributed_rerank.report.page import build_report
from distributed_rerank.report.query_examples import Candidate, ChosenQueries, Strip, choose_queries

__all__ = ["Candidate", "ChosenQueries", "Strip", "build_report", "choose_queries"]
