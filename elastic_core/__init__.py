"""One pretrained hybrid language model in, one elastic checkpoint out, with a nested submodel for every budget."""

from elastic_core import cost as cost
from elastic_core.extract import extract as extract
from elastic_core.importance import rank as rank
from elastic_core.importance import sort_ as sort_
from elastic_core.model import ElasticModel as ElasticModel
from elastic_core.submodel import Submodel as Submodel
