{{/*
What no schema can say: values that contradict one another, or what the chart itself sets. Refused before anything is installed.
*/}}

{{/* Settings that other values say, by the value that says them. They hold for all pods alike, so none may name one pod. */}}
{{- define "quorate.ownSettings" -}}
cluster.size: replicaCount
cluster.first_slot: firstOrdinal
cluster.kind: readers.enabled
kubernetes.stateful_set: kubernetesApi.enabled
kubernetes.namespace: kubernetesApi.enabled
identity.name: fullnameOverride
identity.slot: firstOrdinal
server.advertise_peer: fullnameOverride
backup.url: backup.url
backup.endpoint: backup.endpoint
backup.interval: backup.interval
backup.full_every: backup.fullEvery
backup.keep_fulls: backup.keepFulls
backup.keep_age: backup.keepAge
backup.key_file: backup.keySecret
backup.ca_file: backup.caSecret
restore.from: restore.from
restore.same_revisions: restore.sameRevisions
restore.follow: restore.follow
{{- end -}}

{{- define "quorate.check" -}}
{{- $values := .Values -}}
{{- $name := include "quorate.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "%q cannot name the release's Services: expected a name that begins with a letter, of small letters, digits and -; choose another release name, or set fullnameOverride" $name) -}}
{{- end -}}

{{- $own := list "app.kubernetes.io/name" "app.kubernetes.io/instance" -}}
{{- range $what, $labels := dict "podLabels" $values.podLabels "readers.podLabels" $values.readers.podLabels -}}
{{- range $key, $_ := $labels -}}
{{- if has $key $own -}}
{{- fail (printf "%s may not have %s: the Services find the pods by it; leave it out" $what $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $key, $_ := $values.commonLabels -}}
{{- if or (hasPrefix "helm.sh/" $key) (has $key (list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/version" "app.kubernetes.io/managed-by" "app.kubernetes.io/part-of" "app.kubernetes.io/component")) -}}
{{- fail (printf "commonLabels may not have %s, which the chart sets; leave it out" $key) -}}
{{- end -}}
{{- end -}}
{{- range $key, $_ := $values.podAnnotations -}}
{{- if has $key (list "checksum/settings" "kubectl.kubernetes.io/default-container") -}}
{{- fail (printf "podAnnotations may not have %s, which the chart sets; leave it out" $key) -}}
{{- end -}}
{{- end -}}

{{- $scaling := $values.readers.autoscaling -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "readers.autoscaling.minReplicas is %d, expected at most maxReplicas, %d" (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}

{{- range $setting, $value := include "quorate.ownSettings" . | fromYaml -}}
{{- $path := splitList "." $setting -}}
{{- if hasKey (default dict (index $values.config (first $path))) (last $path) -}}
{{- fail (printf "config.%s is not for values: set %s" $setting $value) -}}
{{- end -}}
{{- end -}}

{{- /* Where the probes, the Services and the volumes of the chart look. */}}
{{- $server := default dict $values.config.server -}}
{{- range $setting, $port := dict "listen_client" "2379" "listen_peer" "2380" -}}
{{- $given := index $server $setting -}}
{{- if $given -}}
{{- $first := "" -}}
{{- range splitList "," (kindIs "slice" $given | ternary (join "," $given) (toString $given)) -}}
{{- if and (not $first) (not (hasPrefix "unix:" (trim .))) -}}{{- $first = trim . -}}{{- end -}}
{{- end -}}
{{- if not (hasSuffix (printf ":%s" $port) $first) -}}
{{- fail (printf "config.server.%s is %q, expected port %s at its first address: Services and probes go there; clients' port is service.port" $setting (toString $given) $port) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with $server.listen_status -}}
{{- if not (hasSuffix ":2381" (toString .)) -}}
{{- fail (printf "config.server.listen_status is %q, expected port 2381: the probes ask there; leave it out" (toString .)) -}}
{{- end -}}
{{- end -}}
{{- if hasKey $server "data_dir" -}}
{{- if not (hasPrefix "/var/lib/quorate/" (toString $server.data_dir)) -}}
{{- fail (printf "config.server.data_dir is %q, expected a directory below /var/lib/quorate, where the claim is mounted" (toString $server.data_dir)) -}}
{{- end -}}
{{- end -}}
{{- with $server.grace_period -}}
{{- $seconds := regexFind "^[0-9]+s$" (toString .) | trimSuffix "s" -}}
{{- if or (not $seconds) (gt (int $seconds) (sub (int $values.terminationGracePeriodSeconds) 1)) -}}
{{- fail (printf "config.server.grace_period is %q, expected seconds (\"55s\") that are fewer than terminationGracePeriodSeconds, %d" (toString .) (int $values.terminationGracePeriodSeconds)) -}}
{{- end -}}
{{- end -}}

{{- $settings := list "server.listen_client" "server.listen_peer" "server.listen_status" "server.data_dir" "server.grace_period" "client_tls.mode" "peer_tls.mode" -}}
{{- range concat $settings (include "quorate.ownSettings" . | fromYaml | keys) -}}
{{- $variable := printf "QUORATE_%s" (replace "." "__" . | upper) -}}
{{- range $values.extraEnv -}}
{{- if or (eq .name $variable) (has .name (list "POD_NAME" "POD_NAMESPACE" "POD_IP")) -}}
{{- fail (printf "extraEnv may not have %s, which the chart decides; leave it out" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $values.extraVolumes -}}
{{- if has .name (list "data" "config" "tls-client" "tls-peer" "auth" "backup-key" "backup-ca") -}}
{{- fail (printf "extraVolumes may not have %s, which is a volume of the chart; choose another name" .name) -}}
{{- end -}}
{{- end -}}
{{- range $values.extraVolumeMounts -}}
{{- $path := trimSuffix "/" .mountPath -}}
{{- if or (has $path (list "/var/lib/quorate" "/var/lib/quorate/data" "/etc/quorate")) (regexMatch "^/etc/quorate-(tls|auth|backup)" $path) -}}
{{- fail (printf "extraVolumeMounts may not have %s, where the chart mounts; choose another path" .mountPath) -}}
{{- end -}}
{{- end -}}
{{- range concat $values.extraContainers $values.initContainers -}}
{{- if eq .name "quorate" -}}
{{- fail "extraContainers and initContainers may not have quorate, which is the server; choose another name" -}}
{{- end -}}
{{- end -}}

{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}
{{- fail "ingress.hosts is empty: expected a host name at least" -}}
{{- end -}}
{{- if and .Values.grpcRoute.enabled (not .Values.grpcRoute.parentRefs) -}}
{{- fail "grpcRoute.parentRefs is empty: expected the Gateway that the route belongs to" -}}
{{- end -}}
{{- if and .Values.service.nodePort (eq .Values.service.type "ClusterIP") -}}
{{- fail "service.nodePort needs service.type NodePort or LoadBalancer" -}}
{{- end -}}
{{- if and (or .Values.service.loadBalancerSourceRanges .Values.service.loadBalancerClass) (ne .Values.service.type "LoadBalancer") -}}
{{- fail "service.loadBalancerSourceRanges and loadBalancerClass need service.type LoadBalancer" -}}
{{- end -}}
{{- if and .Values.service.externalTrafficPolicy (eq .Values.service.type "ClusterIP") -}}
{{- fail "service.externalTrafficPolicy needs service.type NodePort or LoadBalancer" -}}
{{- end -}}
{{- include "quorate.checkTls" . -}}
{{- include "quorate.checkBackup" . -}}
{{- end -}}
