# Round trips with boto3: boto.py ENDPOINT BUCKET, keys in the environment. Prints a line for each step, as bin/s3clients
# does: "ok   NAME" or "FAIL NAME: why".
import hashlib, io, json, random, sys, traceback, urllib.error, urllib.request
import boto3
from boto3.s3.transfer import TransferConfig
from botocore.client import Config
from botocore.exceptions import ClientError

endpoint, bucket = sys.argv[1:]
config = Config(signature_version="s3v4", s3={"addressing_style": "path"}, retries={"max_attempts": 1})
s3 = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config)
small = random.Random(1).randbytes(4099)
big = random.Random(2).randbytes(17 * 1024 * 1024 + 5)
steps = []


def step(f):
    steps.append(f)


def get(key, **more):
    return s3.get_object(Bucket=bucket, Key=key, **more)["Body"].read()


def refused(code, f, **args):
    try:
        f(**args)
    except ClientError as e:
        assert e.response["Error"]["Code"] == code, "%s, want %s" % (e, code)
        return
    raise AssertionError("not refused, want %s" % code)


@step
def create_bucket():
    s3.create_bucket(Bucket=bucket)
    s3.head_bucket(Bucket=bucket)
    assert bucket in [b["Name"] for b in s3.list_buckets()["Buckets"]]
    refused("NoSuchBucket", s3.list_objects_v2, Bucket=bucket + "-absent")


@step
def put_and_get():
    for body in (b"", b"x", small):
        r = s3.put_object(Bucket=bucket, Key="small", Body=body, Metadata={"colour": "blue"}, ContentType="text/odd")
        assert r["ETag"] == '"%s"' % hashlib.md5(body).hexdigest(), r
        r = s3.get_object(Bucket=bucket, Key="small")
        assert r["Body"].read() == body and r["Metadata"] == {"colour": "blue"} and r["ContentType"] == "text/odd", r
    refused("NoSuchKey", s3.get_object, Bucket=bucket, Key="absent")


@step
def upload_and_download_in_parts():
    parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)
    s3.upload_fileobj(io.BytesIO(big), bucket, "big", Config=parts)
    out = io.BytesIO()
    s3.download_fileobj(bucket, "big", out, Config=parts)
    assert out.getvalue() == big
    digests = b"".join(hashlib.md5(big[i : i + (5 << 20)]).digest() for i in range(0, len(big), 5 << 20))
    assert s3.head_object(Bucket=bucket, Key="big")["ETag"] == '"%s-4"' % hashlib.md5(digests).hexdigest()


@step
def ranges():
    n = len(big)
    for r, want in (("0-0", big[:1]), ("5242875-5242885", big[5242875:5242886]), ("-7", big[-7:]), ("%d-" % (n - 3), big[-3:])):
        assert get("big", Range="bytes=" + r) == want, r
    refused("InvalidRange", s3.get_object, Bucket=bucket, Key="big", Range="bytes=%d-" % n)


@step
def list_objects():
    keys = sorted("l/%s%02d" % (("a/", "b/x/", "b/y/", "c")[i % 4], i) for i in range(22))
    for k in keys:
        s3.put_object(Bucket=bucket, Key=k, Body=k.encode())
    for call in ("list_objects_v2", "list_objects"):
        pages = s3.get_paginator(call).paginate(Bucket=bucket, Prefix="l/", PaginationConfig={"PageSize": 5})
        assert [o["Key"] for p in pages for o in p.get("Contents", [])] == keys, call
        pages = list(s3.get_paginator(call).paginate(Bucket=bucket, Prefix="l/", Delimiter="/", PaginationConfig={"PageSize": 2}))
        assert [o["Prefix"] for p in pages for o in p.get("CommonPrefixes", [])] == ["l/a/", "l/b/"], call
        assert [o["Key"] for p in pages for o in p.get("Contents", [])] == [k for k in keys if k.startswith("l/c")], call


@step
def copy():
    s3.copy({"Bucket": bucket, "Key": "big"}, bucket, "copies/of big+1", Config=TransferConfig(multipart_threshold=6 << 20, multipart_chunksize=6 << 20))
    assert get("copies/of big+1") == big
    s3.copy_object(Bucket=bucket, Key="copy", CopySource={"Bucket": bucket, "Key": "small"}, MetadataDirective="REPLACE", Metadata={"colour": "red"})
    r = s3.get_object(Bucket=bucket, Key="copy")
    assert r["Body"].read() == small and r["Metadata"] == {"colour": "red"}, r


@step
def conditions():
    tag = s3.head_object(Bucket=bucket, Key="small")["ETag"]
    assert get("small", IfMatch=tag) == small
    refused("PreconditionFailed", s3.get_object, Bucket=bucket, Key="small", IfMatch='"0"')
    refused("304", s3.get_object, Bucket=bucket, Key="small", IfNoneMatch=tag)
    # boto3 of Debian 12 does not know conditional PUT yet: the header is added by hand.
    def absent(request, **_):
        request.headers["If-None-Match"] = "*"
    s3.meta.events.register("before-sign.s3.PutObject", absent)
    try:
        s3.put_object(Bucket=bucket, Key="first", Body=b"1")
        refused("PreconditionFailed", s3.put_object, Bucket=bucket, Key="first", Body=b"2")
    finally:
        s3.meta.events.unregister("before-sign.s3.PutObject", absent)
    assert get("first") == b"1"


@step
def checksums():
    for a in ("CRC32", "SHA1", "SHA256"):
        r = s3.put_object(Bucket=bucket, Key="sum", Body=small, ChecksumAlgorithm=a)
        h = s3.get_object(Bucket=bucket, Key="sum", ChecksumMode="ENABLED")
        assert h["Body"].read() == small and h["Checksum" + a] == r["Checksum" + a], a
    refused("BadDigest", s3.put_object, Bucket=bucket, Key="sum", Body=b"other", ChecksumSHA256=r["ChecksumSHA256"])
    assert get("sum") == small


@step
def tags():
    want = [{"Key": "a b", "Value": "c+d/e=:@"}, {"Key": "owner", "Value": "me"}]
    s3.put_object(Bucket=bucket, Key="tagged", Body=b"", Tagging="a%20b=c%2Bd%2Fe%3D%3A%40&owner=me")
    for _ in range(2):
        got = s3.get_object_tagging(Bucket=bucket, Key="tagged")["TagSet"]
        assert sorted(got, key=str) == sorted(want, key=str), got
        s3.put_object_tagging(Bucket=bucket, Key="tagged", Tagging={"TagSet": want})
    s3.delete_object_tagging(Bucket=bucket, Key="tagged")
    assert s3.get_object_tagging(Bucket=bucket, Key="tagged")["TagSet"] == []


@step
def presigned_addresses():
    url = s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "small"}, ExpiresIn=60)
    assert urllib.request.urlopen(url).read() == small
    url = s3.generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": "sent there"}, ExpiresIn=60)
    urllib.request.urlopen(urllib.request.Request(url, data=b"sent", method="PUT"))
    assert get("sent there") == b"sent"
    url = s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "small"}, ExpiresIn=60).replace("/small?", "/sum?")
    try:
        urllib.request.urlopen(url)
        raise AssertionError("an address for one object opens another")
    except urllib.error.HTTPError as e:
        assert e.code == 403, e


@step
def policies():
    p = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::%s/small" % bucket}]}
    s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps(p))
    assert urllib.request.urlopen("%s/%s/small" % (endpoint, bucket)).read() == small
    s3.delete_bucket_policy(Bucket=bucket)
    try:
        urllib.request.urlopen("%s/%s/small" % (endpoint, bucket))
        raise AssertionError("open to anybody without a policy")
    except urllib.error.HTTPError as e:
        assert e.code == 403, e


@step
def versions():
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    ids = [s3.put_object(Bucket=bucket, Key="v", Body=b"%d" % i)["VersionId"] for i in range(3)]
    for i, v in enumerate(ids):
        assert get("v", VersionId=v) == b"%d" % i
    marker = s3.delete_object(Bucket=bucket, Key="v")
    assert marker["DeleteMarker"], marker
    refused("NoSuchKey", s3.get_object, Bucket=bucket, Key="v")
    l = s3.list_object_versions(Bucket=bucket, Prefix="v")
    assert [v["VersionId"] for v in l["Versions"]] == ids[::-1] and l["DeleteMarkers"][0]["IsLatest"], l
    s3.delete_object(Bucket=bucket, Key="v", VersionId=marker["VersionId"])
    assert get("v") == b"2"


@step
def delete():
    refused("BucketNotEmpty", s3.delete_bucket, Bucket=bucket)
    for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket, PaginationConfig={"PageSize": 20}):
        for v in page.get("Versions", []) + page.get("DeleteMarkers", []):
            s3.delete_object(Bucket=bucket, Key=v["Key"], VersionId=v["VersionId"])
    s3.delete_bucket(Bucket=bucket)


failed = False
for f in steps:
    name = f.__name__.replace("_", " ")
    try:
        f()
        print("ok  ", name, flush=True)
    except Exception as e:
        failed = True
        where = traceback.extract_tb(e.__traceback__)[-1]
        print("FAIL %s: line %d: %s" % (name, where.lineno, " ".join((repr(e) + " " + where.line).split())[:600]), flush=True)
sys.exit(failed)
