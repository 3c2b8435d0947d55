"""One pretrained hybrid language model in, one elastic checkpoint out, with a nested submodel for every budget."""

from elastic_core import cost as cost
from elastic_core.export.extract import extract as extract
from elastic_core.model.elastic_model import ElasticModel as ElasticModel
from elastic_core.model.submodel import Submodel as Submodel
from elastic_core.search.importance import rank as rank
from elastic_core.search.importance import sort_ as sort_
