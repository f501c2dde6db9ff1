"""Prompts for a live reference if a checkpoint brings none: ordinary English and Chinese."""

from __future__ import annotations

PARAGRAPH = (
    "The river rises in the hills to the north and reaches the sea after a journey of four hundred miles. "
    "In spring the snow melts and the water runs high; by late summer children can walk across it. "
    "这条河发源于北方的群山，流经四百英里之后汇入大海。春天积雪融化，河水上涨；到了夏末，孩子们可以蹚水过河。"
)
PROMPTS = ("Once upon a time there was", "从前有一座山，山里有")
