# The Quorate image: a dynamically linked glibc binary on a minimal base, so that host names resolve through NSS as anywhere
# else on the base. The binary is stripped; `release/build` keeps what was taken off. Needs BuildKit.
#
#   docker build -t quorate .
#
# BUILD_IMAGE must not have a newer glibc than RUNTIME_IMAGE. With BINARY=prebuilt nothing is compiled: the context then is a
# directory that holds `quorate`.
ARG BUILD_IMAGE=docker.io/library/rust:1-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot
ARG BINARY=built

FROM ${BUILD_IMAGE} AS built
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin quorate && strip -o /quorate target/release/quorate && mkdir /data

FROM scratch AS prebuilt
COPY quorate /quorate
WORKDIR /data

FROM ${BINARY} AS binary

# The base may have no shell: nothing is run in this stage.
FROM ${RUNTIME_IMAGE}
COPY --from=binary /quorate /usr/local/bin/quorate
COPY --from=binary --chown=65532:65532 /data /var/lib/quorate
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
WORKDIR /var/lib/quorate
USER 65532:65532
VOLUME /var/lib/quorate
EXPOSE 2379 2380 2381
ENTRYPOINT ["/usr/local/bin/quorate"]
CMD ["serve"]
