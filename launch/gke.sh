# shellcheck shell=bash
# The same settings for Kubernetes: a JobSet, or a command for XPK.

check_gke() {
  local name
  for name in SECRETS_FILE SECRET_MANAGER; do
    [[ -z ${!name} ]] || problem "$name: Kubernetes has no use for it; GKE_SECRET with manifest: \
kubectl create secret generic NAME --from-env-file=FILE"
  done
  if [[ $VERB == manifest ]]; then
    [[ -n $GKE_CLAIM ]] || problem "GKE_CLAIM: needed: a claim on storage that all pods share, as their disks go \
with them; none, if RUN_DIR is on such storage without it"
    [[ $GKE_CLAIM =~ ^(none|)$ || ( -n $SHARED_DIR && $RUN_DIR/ == "$SHARED_DIR"/* ) ]] ||
      problem "SHARED_DIR: where GKE_CLAIM is to be mounted, with RUN_DIR below it, got '$SHARED_DIR'"
  else
    [[ -z $GKE_SECRET ]] || problem "GKE_SECRET: XPK has no option for it; take manifest instead"
  fi
  [[ -n $IMAGE ]] || problem "IMAGE: needed for Kubernetes: an image with the code in /app and its packages"
  [[ -n $TOPOLOGY || -z $GENERATION ]] || problem "TOPOLOGY: needed for $ACCELERATOR on Kubernetes, such as 2x2x4"
}

# quoted TEXT: as a YAML string.
quoted() { printf "'%s'" "${1//\'/\'\'}"; }

# manifest: prints a JobSet. The variables that let the processes find each other are set by GKE.
manifest() {
  local flags pair
  read -ra flags <<<"$TRAIN_FLAGS"
  cat <<YAML
# kubectl apply -f FILE. A failed or preempted slice makes all of them start again, which goes on from the newest
# checkpoint; exit code 2, a wrong configuration, ends the JobSet.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  labels: {run: $NAME}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [2]}
          template:
            metadata:
              labels: {run: $NAME}
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $GKE_ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
YAML
  [[ $CAPACITY != spot ]] || cat <<YAML
                cloud.google.com/gke-spot: 'true'
YAML
  cat <<YAML
              containers:
                - name: train
                  image: $(quoted "$IMAGE")
                  workingDir: /app
                  command: [python, -m, rlhf_jax.train]
                  args:
YAML
  for pair in --config "$CONFIG" --run.dir "$RUN_DIR" "${flags[@]}"; do
    echo "                    - $(quoted "$pair")"
  done
  cat <<YAML
                  ports: [{containerPort: 8471}, {containerPort: 8482}]
                  resources: {limits: {google.com/tpu: $((CHIPS / HOSTS))}}
YAML
  if ((${#ENVIRONMENT[@]})); then
    echo "                  env:"
    for pair in "${ENVIRONMENT[@]}"; do
      echo "                    - {name: ${pair%%=*}, value: $(quoted "${pair#*=}")}"
    done
  fi
  [[ -z $GKE_SECRET ]] || echo "                  envFrom: [{secretRef: {name: $GKE_SECRET}}]"
  [[ $GKE_CLAIM == none ]] || cat <<YAML
                  volumeMounts: [{name: shared, mountPath: $(quoted "$SHARED_DIR")}]
              volumes:
                - {name: shared, persistentVolumeClaim: {claimName: $GKE_CLAIM}}
YAML
}

# xpk: prints the commands for XPK; they make a cluster, attach the storage and start the run.
xpk() {
  local flags cluster workload pair type=$ACCELERATOR command
  read -ra flags <<<"$TRAIN_FLAGS"
  printf -v command ' %q' python -m rlhf_jax.train --config "$CONFIG" --run.dir "$RUN_DIR" "${flags[@]}"
  cluster=(xpk cluster create "--cluster=$CLUSTER" "--tpu-type=$type" "--num-slices=$SLICES" "--project=$PROJECT" "--zone=$ZONE")
  case $CAPACITY in
    spot) cluster+=(--spot) ;;
    on-demand) cluster+=(--on-demand) ;;
    flex-start) cluster+=(--flex) ;;
    reserved) cluster+=("--reservation=$RESERVATION") ;;
  esac
  workload=(xpk workload create "--cluster=$CLUSTER" "--workload=$NAME" "--tpu-type=$type" "--num-slices=$SLICES"
    "--project=$PROJECT" "--zone=$ZONE" "--docker-image=$IMAGE" "--command=cd /app &&$command"
    "--max-restarts=$MAX_RESTARTS" '--restart-on-exit-codes=1,87,130,134,137,143' --termination-grace-period-seconds=120)
  for pair in "${ENVIRONMENT[@]}"; do
    workload+=("--env=$pair")
  done
  printf '%q ' "${cluster[@]}" && echo
  if [[ $SHARED_SOURCE == gs://* ]]; then
    printf '%q ' xpk storage attach "$NAME" --type=gcsfuse "--bucket=${SHARED_SOURCE#gs://}" "--mount-point=$SHARED_DIR" \
      --size=1 --readonly=false --auto-mount=true "--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE" && echo
  else
    say "launch: attach the storage of RUN_DIR to the cluster (xpk storage attach): the disks of pods go with them"
  fi
  printf '%q ' "${workload[@]}" && echo
}
