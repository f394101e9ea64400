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

{{/* What selects the pods; a StatefulSet's selector can never be changed. */}}
{{- define "quorate.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "quorate.labels" -}}
{{ include "quorate.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "quorate.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The pods' host names by ordinal; the server puts the ordinal in place of %d. */}}
{{- define "quorate.peers" -}}
{{- $name := include "quorate.fullname" . -}}
{{- printf "%s-%%d.%s-headless.%s.svc:2380" $name $name .Release.Namespace -}}
{{- end -}}

{{/* The settings as TOML. JSON's scalars and arrays are TOML's too, and keep whole numbers whole. */}}
{{- define "quorate.toml" -}}
{{- $server := dict
      "data_dir" "/var/lib/quorate/data"
      "listen_client" "0.0.0.0:2379"
      "listen_peer" "0.0.0.0:2380"
      "grace_period" (printf "%ds" (sub .Values.terminationGracePeriodSeconds 5)) -}}
{{- $defaults := dict
      "server" $server
      "cluster" (dict "peers" (include "quorate.peers" .))
      "telemetry" (dict "format" "json") -}}
{{- if hasKey (default dict .Values.config.cluster) "size" -}}
{{- fail "config.cluster.size is not for values: set replicaCount" -}}
{{- end -}}
{{- $sections := mergeOverwrite $defaults (deepCopy .Values.config) -}}
{{- $_ := set $sections.cluster "size" (max 1 (int .Values.replicaCount)) -}}
{{- range $section, $settings := $sections }}
[{{ $section }}]
{{- range $key, $value := $settings }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{ end }}
{{- end -}}
