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
{{- $scheme := ternary "" "https://" (eq .Values.tls.client.mode "off") -}}
{{- printf "%s%s.%s.svc:%d" $scheme (include "quorate.fullname" .) .Release.Namespace (int .Values.service.port) -}}
{{- end -}}

{{/* The pods' host names by ordinal; the server puts the ordinal in place of %d. */}}
{{- define "quorate.peers" -}}
{{- $name := include "quorate.fullname" . -}}
{{- printf "%s-%%d.%s-headless.%s.svc:2380" $name $name .Release.Namespace -}}
{{- end -}}

{{/* Refuses values of TLS that cannot work. */}}
{{- define "quorate.checkTls" -}}
{{- range $port, $tls := .Values.tls -}}
{{- if and (ne $tls.mode "off") (not $tls.secret) -}}
{{- fail (printf "tls.%s.secret is needed for tls.%s.mode %s: the chart makes no certificates" $port $port $tls.mode) -}}
{{- end -}}
{{- end -}}
{{- if and (ne .Values.tls.peer.mode "off") .Values.readers.enabled -}}
{{- fail "readers.enabled cannot go with tls.peer.mode: a reader is known by its pod's address, which is in no certificate" -}}
{{- end -}}
{{- if and (ne .Values.tls.client.clientCert "off") (eq .Values.tls.client.mode "off") -}}
{{- fail "tls.client.clientCert needs tls.client.mode" -}}
{{- end -}}
{{- end -}}

{{/* Settings of one port's files. Takes `mode` and `port`. */}}
{{- define "quorate.tlsFiles" -}}
{{- $dir := printf "/etc/quorate-tls/%s" .port -}}
{{- if eq .mode "auto" -}}
mode: auto
issuer_cert_file: {{ $dir }}/tls.crt
issuer_key_file: {{ $dir }}/tls.key
{{- else -}}
mode: files
cert_file: {{ $dir }}/tls.crt
key_file: {{ $dir }}/tls.key
{{- end -}}
{{- end -}}

{{/* What the pods' settings follow from; with TLS off, as it was before there was any. */}}
{{- define "quorate.checksum" -}}
{{- $of := .config -}}
{{- if or (ne .tls.client.mode "off") (ne .tls.peer.mode "off") -}}
{{- $of = dict "config" .config "tls" .tls "readers" .readers -}}
{{- else if .readers -}}
{{- $of = dict "config" .config "readers" true -}}
{{- end -}}
{{- $of | toJson | sha256sum -}}
{{- end -}}

{{/* Directories, not subPaths: a file mounted by subPath would keep the certificate of the day its pod started. */}}
{{- define "quorate.tlsMounts" -}}
{{- range $port, $tls := .Values.tls }}
{{- if ne $tls.mode "off" }}
- name: tls-{{ $port }}
  mountPath: /etc/quorate-tls/{{ $port }}
  readOnly: true
{{- end }}
{{- end }}
{{- end -}}

{{- define "quorate.tlsVolumes" -}}
{{- range $port, $tls := .Values.tls }}
{{- if ne $tls.mode "off" }}
- name: tls-{{ $port }}
  secret:
    secretName: {{ $tls.secret | quote }}
    defaultMode: 288 # 0440
{{- end }}
{{- end }}
{{- end -}}

{{/* What the client in a member's own container goes by: the status port, which is plain, and the CA for the others. */}}
{{- define "quorate.tlsEnv" -}}
{{- if ne .Values.tls.client.mode "off" -}}
- name: QUORATE_ENDPOINTS
  value: http://127.0.0.1:2381
- name: QUORATE_CACERT
  value: {{ include "quorate.clientCa" . }}
{{- end -}}
{{- end -}}

{{- define "quorate.clientCa" -}}
/etc/quorate-tls/client/{{ ternary "tls.crt" "ca.crt" (eq .Values.tls.client.mode "auto") }}
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
{{- /* Left out where it is off: a member of an older version that is rolled forward would not know it. */}}
{{- $_ := include "quorate.checkTls" $root -}}
{{- $client := $values.tls.client -}}
{{- if ne $client.mode "off" -}}
{{- $tls := include "quorate.tlsFiles" (dict "mode" $client.mode "port" "client") | fromYaml -}}
{{- if eq $client.mode "auto" -}}
{{- $name := include "quorate.fullname" $root -}}
{{- $names := list -}}
{{- range list $name (printf "%s-readers" $name) -}}
{{- $names = concat $names (list . (printf "%s.%s" . $root.Release.Namespace) (printf "%s.%s.svc" . $root.Release.Namespace)) -}}
{{- end -}}
{{- $_ := set $tls "names" $names -}}
{{- end -}}
{{- if ne $client.clientCert "off" -}}
{{- $_ := set $tls "client_cert" $client.clientCert -}}
{{- if eq $client.mode "secret" -}}
{{- $_ := set $tls "ca_file" "/etc/quorate-tls/client/ca.crt" -}}
{{- end -}}
{{- end -}}
{{- $_ := set $defaults "client_tls" $tls -}}
{{- end -}}
{{- $peer := $values.tls.peer -}}
{{- if ne $peer.mode "off" -}}
{{- $tls := include "quorate.tlsFiles" (dict "mode" $peer.mode "port" "peer") | fromYaml -}}
{{- if eq $peer.mode "secret" -}}
{{- $_ := set $tls "ca_file" "/etc/quorate-tls/peer/ca.crt" -}}
{{- end -}}
{{- $_ := set $defaults "peer_tls" $tls -}}
{{- end -}}
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
