from .embedding import embed as embed
from .index import Hit as Hit, Index as Index, build_index as build_index
from .searcher import Searcher as Searcher
