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

{{/* Labels of an object, with its own over them. Takes `root` and `own`. */}}
{{- define "quorate.labelsWith" -}}
{{- merge (deepCopy .own) (include "quorate.labels" .root | fromYaml) | toYaml -}}
{{- end -}}

{{/* Annotations of an object: those of all objects, and its own over them. Takes `root`, and `own` if it has any. */}}
{{- define "quorate.annotations" -}}
{{- with mergeOverwrite (deepCopy .root.Values.commonAnnotations) (deepCopy (default dict .own)) -}}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* How many members there are to be. The StatefulSet's own number where `replicaCount` is null: to leave the field out would make it 1. */}}
{{- define "quorate.replicas" -}}
{{- if kindIs "invalid" .Values.replicaCount -}}
{{- $set := lookup "apps/v1" "StatefulSet" .Release.Namespace (include "quorate.fullname" .) -}}
{{- if $set -}}{{- int $set.spec.replicas -}}{{- else -}}3{{- end -}}
{{- else -}}
{{- int .Values.replicaCount -}}
{{- end -}}
{{- end -}}

{{/* All interfaces: with IPv6 among the Services' families those of both. */}}
{{- define "quorate.anyHost" -}}
{{- $service := .Values.service -}}
{{- if or (has "IPv6" $service.ipFamilies) (has $service.ipFamilyPolicy (list "PreferDualStack" "RequireDualStack")) -}}
[::]
{{- else -}}
0.0.0.0
{{- end -}}
{{- end -}}

{{/* IP families of a Service. */}}
{{- define "quorate.ipFamilies" -}}
{{- with .Values.service.ipFamilyPolicy }}
ipFamilyPolicy: {{ . }}
{{- end }}
{{- with .Values.service.ipFamilies }}
ipFamilies:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What all pods of the release have in their spec. */}}
{{- define "quorate.podNetwork" -}}
{{- with .Values.hostAliases }}
hostAliases:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.dnsPolicy }}
dnsPolicy: {{ . }}
{{- end }}
{{- with .Values.dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* OpenShift's SCC gives each namespace users and groups, and refuses others. */}}
{{- define "quorate.podSecurityContext" -}}
{{- $context := .Values.podSecurityContext -}}
{{- if .Values.openshift.enabled -}}
{{- $context = omit $context "runAsUser" "runAsGroup" "fsGroup" "supplementalGroups" -}}
{{- end -}}
{{- toYaml $context -}}
{{- end -}}

{{- define "quorate.securityContext" -}}
{{- $context := .Values.securityContext -}}
{{- if .Values.openshift.enabled -}}
{{- $context = omit $context "runAsUser" "runAsGroup" -}}
{{- end -}}
{{- toYaml $context -}}
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

{{/* What the pods' settings follow from; where nothing is turned on, as it was in 0.1. Takes `root`, and whether there are `readers`. */}}
{{- define "quorate.checksum" -}}
{{- $values := .root.Values -}}
{{- $of := $values.config -}}
{{- if or (ne $values.tls.client.mode "off") (ne $values.tls.peer.mode "off") -}}
{{- $of = dict "config" $of "tls" $values.tls "readers" .readers -}}
{{- else if .readers -}}
{{- $of = dict "config" $of "readers" true -}}
{{- end -}}
{{- if ne (include "quorate.anyHost" .root) "0.0.0.0" -}}
{{- $of = dict "of" $of "host" (include "quorate.anyHost" .root) -}}
{{- end -}}
{{- /* Where users are is a setting; who they are is none. */}}
{{- with include "quorate.authSettings" .root -}}
{{- $of = dict "of" $of "auth" . -}}
{{- end -}}
{{- if include "quorate.hasStore" .root -}}
{{- $of = dict "of" $of "store" (include "quorate.backupSettings" .root) -}}
{{- end -}}
{{- $of | toJson | sha256sum -}}
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

{{/* What of auth is a setting: where users are, and who issues tokens; empty if neither is asked for. */}}
{{- define "quorate.authSettings" -}}
{{- $of := dict -}}
{{- if include "quorate.isAuthDeclared" . -}}
{{- $_ := set $of "declared" (default "own" .Values.auth.existingSecret) -}}
{{- end -}}
{{- if .Values.auth.serviceAccounts.audience -}}
{{- $_ := set $of "serviceAccounts" .Values.auth.serviceAccounts -}}
{{- end -}}
{{- if $of -}}{{- toJson $of -}}{{- end -}}
{{- end -}}

{{/* Whether users are declared. */}}
{{- define "quorate.isAuthDeclared" -}}
{{- if and .Values.auth.bootstrap .Values.auth.existingSecret -}}
{{- fail "auth.bootstrap and auth.existingSecret are one or the other" -}}
{{- end -}}
{{- if or .Values.auth.bootstrap .Values.auth.existingSecret -}}true{{- end -}}
{{- end -}}

{{- define "quorate.authMounts" -}}
{{- if include "quorate.isAuthDeclared" . -}}
- name: auth
  mountPath: /etc/quorate-auth
  readOnly: true
{{- end -}}
{{- end -}}

{{- define "quorate.authVolumes" -}}
{{- if include "quorate.isAuthDeclared" . -}}
- name: auth
  secret:
    secretName: {{ default (printf "%s-auth" (include "quorate.fullname" .)) .Values.auth.existingSecret | quote }}
    defaultMode: 288 # 0440
{{- end -}}
{{- end -}}

{{/* The settings as TOML. JSON's scalars and arrays are TOML's too, and keep whole numbers whole. Takes `root` and `role`. */}}
{{- define "quorate.toml" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $server := dict
      "data_dir" "/var/lib/quorate/data"
      "listen_client" (printf "%s:2379" (include "quorate.anyHost" $root))
      "listen_peer" (printf "%s:2380" (include "quorate.anyHost" $root))
      "grace_period" (printf "%ds" (sub $values.terminationGracePeriodSeconds 5)) -}}
{{- $defaults := dict
      "server" $server
      "cluster" (dict "peers" (include "quorate.peers" $root))
      "telemetry" (dict "format" "json") -}}
{{- /* Left out where it is off: a member of an older version that is rolled forward would not know it. */}}
{{- $defaults := merge $defaults (include "quorate.tlsSettings" $root | fromYaml) -}}
{{- if eq .role "member" -}}
{{- $defaults = merge $defaults (include "quorate.backupSettings" $root | fromYaml) -}}
{{- end -}}
{{- if include "quorate.isAuthDeclared" $root -}}
{{- $_ := set $defaults "auth" (dict "bootstrap" "/etc/quorate-auth/users.toml") -}}
{{- end -}}
{{- with $values.auth.serviceAccounts -}}
{{- if .audience -}}
{{- $_ := set $defaults "oidc" (dict "issuer" "kubernetes" "audiences" (list .audience) "roles" .roles) -}}
{{- else if .roles -}}
{{- fail "auth.serviceAccounts.roles needs auth.serviceAccounts.audience" -}}
{{- end -}}
{{- end -}}
{{- $sections := mergeOverwrite $defaults (deepCopy $values.config) -}}
{{- /* Left out while nobody wants any: a member of an older version that is rolled forward would not know it. */}}
{{- if and $values.readers.enabled (not (hasKey $sections.cluster "readers")) -}}
{{- $_ := set $sections.cluster "readers" true -}}
{{- end -}}
{{- $_ := set $sections.cluster "size" (max 1 (int (include "quorate.replicas" $root))) -}}
{{- $_ := set $sections.cluster "first_slot" (int $values.firstOrdinal) -}}
{{- if eq .role "member" -}}
{{- $kubernetes := default dict $sections.kubernetes -}}
{{- if $values.kubernetesApi.enabled -}}
{{- $_ := set $kubernetes "stateful_set" (include "quorate.fullname" $root) -}}
{{- end -}}
{{- $_ := set $sections "kubernetes" $kubernetes -}}
{{- else -}}
{{- $_ := unset $sections "kubernetes" -}}
{{- /* What is said of them below `config` is nothing without a store. */}}
{{- $_ := unset $sections "backup" -}}
{{- $_ := unset $sections "restore" -}}
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
