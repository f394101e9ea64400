{{/* The release's name, short enough that `<name>-headless` and a pod's labels stay valid. */}}
{{- define "quorate.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "quorate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{/* What selects the members' pods; a StatefulSet's selector can never be changed. */}}
{{- define "quorate.selectorLabels" -}}
app.kubernetes.io/name: {{ include "quorate.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* What selects the readers' pods: no selector of the members may mean them. */}}
{{- define "quorate.readerSelectorLabels" -}}
app.kubernetes.io/name: {{ include "quorate.name" . }}-reader
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* What selects the pod of `helm test`. */}}
{{- define "quorate.testSelectorLabels" -}}
app.kubernetes.io/name: {{ include "quorate.name" . }}-test
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of an object that are the same whatever it belongs to. */}}
{{- define "quorate.sharedLabels" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: quorate
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "quorate.labels" -}}
{{ include "quorate.selectorLabels" . }}
{{ include "quorate.sharedLabels" . }}
{{- end -}}

{{- define "quorate.readerLabels" -}}
{{ include "quorate.readerSelectorLabels" . }}
{{ include "quorate.sharedLabels" . }}
{{- end -}}

{{- define "quorate.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Whether the chart makes the account, and with it the Role. */}}
{{- define "quorate.makesAccount" -}}
{{- if not .Values.serviceAccount.name -}}true{{- end -}}
{{- end -}}

{{- define "quorate.serviceAccountName" -}}
{{- default (include "quorate.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{/* Where clients inside of the cluster connect. */}}
{{- define "quorate.endpoint" -}}
{{- printf "%s.%s.svc:%d" (include "quorate.fullname" .) .Release.Namespace (int .Values.service.port) -}}
{{- end -}}

{{/* The pods' host names by ordinal; the server puts the ordinal in place of %d. */}}
{{- define "quorate.peers" -}}
{{- $name := include "quorate.fullname" . -}}
{{- printf "%s-%%d.%s-headless.%s.svc:2380" $name $name .Release.Namespace -}}
{{- end -}}

{{/* The settings as TOML. JSON's scalars and arrays are TOML's too, and keep whole numbers whole. Takes `root` and `role`. */}}
{{- define "quorate.toml" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- if hasKey (default dict $values.config.cluster) "size" -}}
{{- fail "config.cluster.size is not for values: set replicaCount" -}}
{{- end -}}
{{- if hasKey (default dict $values.config.cluster) "first_slot" -}}
{{- fail "config.cluster.first_slot is not for values: set firstOrdinal" -}}
{{- end -}}
{{- if hasKey (default dict $values.config.kubernetes) "stateful_set" -}}
{{- fail "config.kubernetes.stateful_set is not for values: set kubernetesApi.enabled" -}}
{{- end -}}
{{- $server := dict
      "data_dir" "/var/lib/quorate/data"
      "listen_client" "0.0.0.0:2379"
      "listen_peer" "0.0.0.0:2380"
      "grace_period" (printf "%ds" (sub $values.terminationGracePeriodSeconds 5)) -}}
{{- $defaults := dict
      "server" $server
      "cluster" (dict "peers" (include "quorate.peers" $root))
      "telemetry" (dict "format" "json") -}}
{{- $sections := mergeOverwrite $defaults (deepCopy $values.config) -}}
{{- /* Left out while nobody wants any: a member of an older version that is rolled forward would not know it. */}}
{{- if and $values.readers.enabled (not (hasKey $sections.cluster "readers")) -}}
{{- $_ := set $sections.cluster "readers" true -}}
{{- end -}}
{{- $_ := set $sections.cluster "size" (max 1 (int $values.replicaCount)) -}}
{{- $_ := set $sections.cluster "first_slot" (int $values.firstOrdinal) -}}
{{- if eq .role "member" -}}
{{- $kubernetes := default dict $sections.kubernetes -}}
{{- if $values.kubernetesApi.enabled -}}
{{- $_ := set $kubernetes "stateful_set" (include "quorate.fullname" $root) -}}
{{- end -}}
{{- $_ := set $sections "kubernetes" $kubernetes -}}
{{- else -}}
{{- $_ := unset $sections "kubernetes" -}}
{{- $_ := set $sections.cluster "join" (list (printf "%s-headless.%s.svc:2380" (include "quorate.fullname" $root) $root.Release.Namespace)) -}}
{{- end -}}
{{- range $section, $settings := $sections }}
{{- if $settings }}
[{{ $section }}]
{{- range $key, $value := $settings }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{ end }}
{{- end }}
{{- end -}}
