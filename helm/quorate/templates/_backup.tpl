{{/*
Backups, and what a new cluster begins with: the settings, the Secrets, and how the store is reached. Members have all of it, readers nothing.
*/}}

{{/* Whether a store is named at all. */}}
{{- define "quorate.hasStore" -}}
{{- if or .Values.backup.url .Values.restore.from .Values.restore.follow -}}true{{- end -}}
{{- end -}}

{{/* Whether one of them is reached over the network by the members themselves. */}}
{{- define "quorate.hasBucket" -}}
{{- range list .Values.backup.url .Values.restore.from .Values.restore.follow -}}
{{- if regexMatch "^(s3|gs|az)://" . -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{/* Refuses values that cannot work. */}}
{{- define "quorate.checkBackup" -}}
{{- $backup := .Values.backup -}}
{{- if not (include "quorate.hasStore" .) -}}
{{- range list "endpoint" "credentialsSecret" "keySecret" "caSecret" -}}
{{- if index $backup . -}}
{{- fail (printf "backup.%s has no use without backup.url, restore.from or restore.follow: set one of these, or leave it out" .) -}}
{{- end -}}
{{- end -}}
{{- if .Values.restore.sameRevisions -}}
{{- fail "restore.sameRevisions has no use without restore.from" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.restore.from .Values.restore.follow -}}
{{- fail "restore.from and restore.follow are one or the other: a standby begins with the newest moment" -}}
{{- end -}}
{{- if and .Values.restore.follow (include "quorate.isAuthDeclared" .) -}}
{{- fail "restore.follow cannot go with auth.bootstrap or auth.existingSecret: a standby has its source's users" -}}
{{- end -}}
{{- $memory := regexFind "^[0-9]+Mi$" (toString (dig "limits" "memory" "" (default dict .Values.resources))) | trimSuffix "Mi" -}}
{{- if and (or $backup.url .Values.restore.follow) $memory (lt (int $memory) 192) -}}
{{- fail (printf "resources.limits.memory is %sMi, and with backup.url or restore.follow a member needs 192Mi: raise it" $memory) -}}
{{- end -}}
{{- range $value, $url := dict "backup.url" $backup.url "restore.from" .Values.restore.from "restore.follow" .Values.restore.follow -}}
{{- if and $backup.endpoint (hasPrefix "gs://" $url) -}}
{{- fail (printf "backup.endpoint cannot go with %s %q: Google's own is the only one there" $value $url) -}}
{{- end -}}
{{- $directory := trimPrefix "file://" $url -}}
{{- if eq $value "restore.from" -}}
{{- $directory = regexReplaceAll "@[^@]*$" $directory "" -}}
{{- end -}}
{{- if hasPrefix "/" $directory -}}
{{- $isMounted := false -}}
{{- range $.Values.extraVolumeMounts -}}
{{- if hasPrefix (printf "%s/" (trimSuffix "/" .mountPath)) (printf "%s/" (trimSuffix "/" $directory)) -}}
{{- $isMounted = true -}}
{{- end -}}
{{- end -}}
{{- if not $isMounted -}}
{{- fail (printf "%s is the directory %s, and no volume is mounted there: name one that all members share in extraVolumes and extraVolumeMounts, or a bucket (s3://, gs://, az://)" $value $directory) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The settings; left out where they are not asked for: a member of an older version that is rolled forward would not know them. */}}
{{- define "quorate.backupSettings" -}}
{{- $values := .Values.backup -}}
{{- if include "quorate.hasStore" . -}}
{{- $backup := dict -}}
{{- with $values.endpoint -}}{{- $_ := set $backup "endpoint" . -}}{{- end -}}
{{- if $values.keySecret -}}{{- $_ := set $backup "key_file" "/etc/quorate-backup-key/key" -}}{{- end -}}
{{- if $values.caSecret -}}{{- $_ := set $backup "ca_file" "/etc/quorate-backup-ca/ca.crt" -}}{{- end -}}
{{- if $values.url -}}
{{- $backup = merge $backup (dict "url" $values.url "interval" $values.interval "full_every" $values.fullEvery "keep_fulls" (int $values.keepFulls) "keep_age" $values.keepAge) -}}
{{- end -}}
{{- $settings := dict "backup" $backup -}}
{{- with .Values.restore.follow -}}
{{- $_ := set $settings "restore" (dict "follow" .) -}}
{{- end -}}
{{- with .Values.restore.from -}}
{{- $_ := set $settings "restore" (dict "from" . "same_revisions" $.Values.restore.sameRevisions) -}}
{{- end -}}
{{- toYaml $settings -}}
{{- end -}}
{{- end -}}

{{/* So that `kubectl exec POD -- quorate backup status` knows where. */}}
{{- define "quorate.backupEnv" -}}
{{- range $key, $value := (include "quorate.backupSettings" . | fromYaml).backup -}}
{{- if has $key (list "url" "endpoint" "key_file" "ca_file") }}
- name: QUORATE_BACKUP__{{ upper $key }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}
{{- end -}}

{{- define "quorate.backupMounts" -}}
{{- if .Values.backup.keySecret }}
- name: backup-key
  mountPath: /etc/quorate-backup-key
  readOnly: true
{{- end }}
{{- if .Values.backup.caSecret }}
- name: backup-ca
  mountPath: /etc/quorate-backup-ca
  readOnly: true
{{- end }}
{{- end -}}

{{- define "quorate.backupVolumes" -}}
{{- if .Values.backup.keySecret }}
- name: backup-key
  secret:
    secretName: {{ .Values.backup.keySecret | quote }}
    defaultMode: 288 # 0440
    items: [{key: key, path: key}]
{{- end }}
{{- if .Values.backup.caSecret }}
- name: backup-ca
  secret:
    secretName: {{ .Values.backup.caSecret | quote }}
    defaultMode: 288 # 0440
    items: [{key: ca.crt, path: ca.crt}]
{{- end }}
{{- end -}}

{{/* Egress to buckets. Without a Secret the credentials come from the clouds' services for that, which have link-local addresses. */}}
{{- define "quorate.backupEgress" -}}
{{- if include "quorate.hasBucket" . -}}
{{- $endpoint := .Values.backup.endpoint -}}
{{- $port := regexFind "^:[0-9]+" (regexReplaceAll "^https?://(\\[[^]]*\\])?[^:/]*" $endpoint "") | trimPrefix ":" -}}
{{- $ports := list (default (ternary "80" "443" (hasPrefix "http://" $endpoint)) $port) -}}
{{- if not .Values.backup.credentialsSecret -}}
{{- $ports = append $ports "443" -}}
{{- end }}
- ports:
    {{- range $ports | uniq }}
    - protocol: TCP
      port: {{ . }}
    {{- end }}
{{- if not .Values.backup.credentialsSecret }}
- to:
    - ipBlock:
        cidr: 169.254.0.0/16
{{- end }}
{{- end -}}
{{- end -}}
