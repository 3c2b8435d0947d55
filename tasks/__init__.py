"""The pipeline's stages. What DVC has started ends with DVC, however that ends: from here on, before slow imports."""

from tasks.runtime import stop_with_dvc

stop_with_dvc.hold()
