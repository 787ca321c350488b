"""The command line and one file per job: where the library, Ray and MLflow are put together."""
