# MLflow's server and Optuna's dashboard; no part of Rampart runs here.
FROM python:3.11-slim
RUN pip install --no-cache-dir "mlflow[auth]==3.17.2" "optuna==5.0.0" optuna-dashboard "psycopg[binary]" psycopg2-binary boto3
RUN useradd --create-home rampart
USER rampart
WORKDIR /home/rampart
