# shellcheck shell=bash disable=SC2154
# For tpu.sh, which sources it: refuses files of this machine that a TPU's hosts would not have. They get the project's
# files (what git knows or does not ignore) and read gs:// and the hub; a data disk is mounted under /mnt.
# $train and $bucket are tpu.sh's, $project is common.sh's.

# given KEY: the value of a config key: the last one in the trainer's arguments, or else in the config file.
given() {
  local word next="" found="" file=""
  for word in "${train[@]}"; do
    case "$next$word" in
      "--config.$1 "*) found=${word} ;;
      "--config "*) file=$word ;;
      "--config.$1="*) found=${word#*=} ;;
      --config=*) file=${word#*=} ;;
    esac
    next=""
    case "$word" in "--config.$1" | --config) next="$word " ;; esac
  done
  [ -z "$found" ] || { printf '%s' "$found" && return 0; }
  [ ! -f "$project/$file" ] ||
    sed -n "s/^[[:space:]]*[A-Za-z_]*\.${1/./\\.}[[:space:]]*=[[:space:]]*[\"']\([^\"']*\)[\"'].*/\1/p" "$project/$file" | tail -n 1
}

# travels PATH: whether setup copies it, a file of the project or a folder with some.
travels() {
  [ -e "$project/$1" ] || return 1
  [ ! -e "$project/.git" ] || [ -n "$(cd "$project" && git ls-files --cached --others --exclude-standard -- "$1")" ]
}

# stays_here PATH: prints why the TPU's hosts would not have it; nothing where they do, or it is no path.
stays_here() {
  local path=${1#./}
  case "$path" in
    "" | *://* | /mnt/*) return 0 ;;
    /* | "~"* | ../*) echo "is a path of this machine" && return 0 ;;
  esac
  if travels "$path"; then
    return 0
  elif [ -e "$project/$path" ]; then
    echo "is ignored by git, so it is not copied"
  elif [ -e "$path" ] || [[ "$path" =~ \.(jsonl|ndjson|json|csv|tsv|parquet|arrow|gguf|txt|py)$ ]]; then
    echo "is not in the project"
  fi
}

# refuse_local_paths: ends with a line where the trainer's arguments name what the TPU's hosts would not have.
refuse_local_paths() {
  local key path why word before="" there="the TPU's hosts will not have it"
  for word in "${train[@]}"; do
    path=""
    [ "$before" != --config ] || path=$word
    case "$word" in --config=*) path=${word#*=} ;; esac
    before=$word
    why=$(stays_here "$path")
    [ -z "$why" ] || die "--config $path $why, and $there: put it into the project, which is copied to them"
  done
  for key in data.train data.eval; do
    path=$(given "$key")
    why=$(stays_here "$path")
    [ -z "$why" ] || die "$key=$path $why, and $there: gcloud storage cp $path gs://${bucket:-BUCKET}/, then \
--config.$key=gs://${bucket:-BUCKET}/$(basename "$path")"
  done
  for key in model.path model.adapter; do
    path=$(given "$key")
    why=$(stays_here "$path")
    [ -z "$why" ] || die "$key=$path $why, and $there: give a hub id, or put it on a disk that they mount under /mnt"
  done
}
