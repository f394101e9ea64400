{{/*
TLS: which Secrets, how they are mounted, and the settings that look there. `tls.yaml` makes what the chart makes itself.
*/}}

{{/* The Secret of a port's files. Takes `root` and `port`. */}}
{{- define "quorate.tlsSecret" -}}
{{- $tls := index .root.Values.tls .port -}}
{{- $name := include "quorate.fullname" .root -}}
{{- if eq $tls.mode "certManager" -}}
{{- printf "%s-%s-tls" $name .port -}}
{{- else -}}
{{- default (printf "%s-%s-ca" $name .port) $tls.secret -}}
{{- end -}}
{{- end -}}

{{/* Refuses values of TLS that cannot work. */}}
{{- define "quorate.checkTls" -}}
{{- range $port, $tls := .Values.tls -}}
{{- if and (eq $tls.mode "secret") (not $tls.secret) -}}
{{- fail (printf "tls.%s.secret is needed for tls.%s.mode secret: the Secret that holds the members' certificate" $port $port) -}}
{{- end -}}
{{- if and (eq $tls.mode "certManager") (not $tls.issuerRef.name) -}}
{{- fail (printf "tls.%s.issuerRef.name is needed for tls.%s.mode certManager" $port $port) -}}
{{- end -}}
{{- if and (eq $tls.mode "certManager") $tls.secret -}}
{{- fail (printf "tls.%s.secret has no use with tls.%s.mode certManager, which names the Secret itself: leave it out" $port $port) -}}
{{- end -}}
{{- if hasKey (default dict (index $.Values.config (printf "%s_tls" $port))) "mode" -}}
{{- fail (printf "config.%s_tls.mode is not for values: set tls.%s.mode" $port $port) -}}
{{- end -}}
{{- end -}}
{{- $peer := .Values.tls.peer.mode -}}
{{- if and (has $peer (list "secret" "certManager")) .Values.readers.enabled -}}
{{- fail (printf "readers.enabled cannot go with tls.peer.mode %s: a reader is known by its pod's address, which is in no certificate that is made beforehand; with auto it makes its own" $peer) -}}
{{- end -}}
{{- if and (ne .Values.tls.client.clientCert "off") (eq .Values.tls.client.mode "off") -}}
{{- fail "tls.client.clientCert needs tls.client.mode" -}}
{{- end -}}
{{- end -}}

{{/* Names of the clients' Services, and of what stands for all pods. */}}
{{- define "quorate.serviceNames" -}}
{{- $name := include "quorate.fullname" . -}}
{{- $names := list -}}
{{- range list $name (printf "%s-readers" $name) -}}
{{- $names = concat $names (list . (printf "%s.%s" . $.Release.Namespace) (printf "%s.%s.svc" . $.Release.Namespace)) -}}
{{- end -}}
{{- toJson $names -}}
{{- end -}}

{{- define "quorate.headlessName" -}}
{{- printf "%s-headless.%s.svc" (include "quorate.fullname" .) .Release.Namespace -}}
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

{{/* The sections client_tls and peer_tls; neither where its port is plain. */}}
{{- define "quorate.tlsSettings" -}}
{{- $sections := dict -}}
{{- $client := .Values.tls.client -}}
{{- if ne $client.mode "off" -}}
{{- $tls := include "quorate.tlsFiles" (dict "mode" $client.mode "port" "client") | fromYaml -}}
{{- if eq $client.mode "auto" -}}
{{- $_ := set $tls "names" (include "quorate.serviceNames" . | fromJsonArray) -}}
{{- end -}}
{{- if ne $client.clientCert "off" -}}
{{- $_ := set $tls "client_cert" $client.clientCert -}}
{{- if ne $client.mode "auto" -}}
{{- $_ := set $tls "ca_file" "/etc/quorate-tls/client/ca.crt" -}}
{{- end -}}
{{- end -}}
{{- $_ := set $sections "client_tls" $tls -}}
{{- end -}}
{{- $peer := .Values.tls.peer -}}
{{- if ne $peer.mode "off" -}}
{{- $tls := include "quorate.tlsFiles" (dict "mode" $peer.mode "port" "peer") | fromYaml -}}
{{- if eq $peer.mode "auto" -}}
{{- /* Under this name a reader asks for members. */}}
{{- $_ := set $tls "names" (list (include "quorate.headlessName" .)) -}}
{{- else -}}
{{- $_ := set $tls "ca_file" "/etc/quorate-tls/peer/ca.crt" -}}
{{- end -}}
{{- /* A running release comes to TLS by one upgrade; a cluster that forms anew is never plain with it. */}}
{{- $_ := set $tls "plain" "until-all" -}}
{{- $_ := set $sections "peer_tls" $tls -}}
{{- end -}}
{{- toYaml $sections -}}
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
    secretName: {{ include "quorate.tlsSecret" (dict "root" $ "port" $port) | quote }}
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

{{/* Whether a cluster can be looked into. The account is in every namespace; the namespace may be one that Helm has yet to make. */}}
{{- define "quorate.seesCluster" -}}
{{- if lookup "v1" "ServiceAccount" .Release.Namespace "default" -}}
true
{{- else if lookup "v1" "Namespace" "" "default" -}}
true
{{- end -}}
{{- end -}}

{{/*
The chart's own CA of a port, `certificate` and `key` in base64: what its Secret holds, or a new one where there is no such Secret. Takes
`root` and `port`.
*/}}
{{- define "quorate.ca" -}}
{{- $secret := include "quorate.tlsSecret" . -}}
{{- $old := lookup "v1" "Secret" .root.Release.Namespace $secret -}}
{{- if $old -}}
{{- $data := default dict $old.data -}}
{{- if not (and (index $data "tls.crt") (index $data "tls.key")) -}}
{{- fail (printf "Secret %s has no tls.crt and tls.key: expected the CA that this chart has made; delete the Secret to have a new CA, which current members do not trust, or set tls.%s.secret" $secret .port) -}}
{{- end -}}
{{- dict "certificate" (index $data "tls.crt") "key" (index $data "tls.key") | toJson -}}
{{- else if include "quorate.seesCluster" .root -}}
{{- $ca := genCAWithKey (printf "%s %s CA" (include "quorate.fullname" .root) .port) 3650 (genPrivateKey "ecdsa") -}}
{{- dict "certificate" (b64enc $ca.Cert) "key" (b64enc $ca.Key) | toJson -}}
{{- else -}}
{{- fail (printf "tls.%s.secret is needed here: without a look into a cluster (helm template, Argo CD, --dry-run) the chart would make another CA each time, which current members do not trust. Make one (`quorate cert ca`, then `kubectl create secret tls`) and name it, or install with helm" .port) -}}
{{- end -}}
{{- end -}}
