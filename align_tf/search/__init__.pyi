from .embedding import embed as embed
from .index import Hit as Hit
from .index import Index as Index
from .index import build_index as build_index
from .searcher import Searcher as Searcher
