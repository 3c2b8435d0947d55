from elastic_core.model.elastic import ElasticModel as ElasticModel
